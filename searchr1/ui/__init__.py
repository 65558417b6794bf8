"""Pages for a browser: one set of style sheets, scripts, templates and HTML parts, used by every page."""
