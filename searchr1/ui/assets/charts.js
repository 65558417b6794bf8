// Lines over steps and stacked areas, drawn as SVG, with the values under the pointer.

const WIDTH = 420, HEIGHT = 210, LEFT = 52, RIGHT = 10, TOP = 10, BOTTOM = 24;
const SMOOTHED_FROM = 80;  // a line with at least so many points is drawn faintly, with its moving mean on top

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function ticks(low, high, most) {
  const rough = (high - low) / Math.max(most - 1, 1), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(factor => factor * power).find(size => size >= rough * (1 - 1e-9));
  const found = [];
  for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i++) found.push(i * step);
  return found;
}

function frame(points) {
  let left = Math.min(...points.map(p => p[0])), right = Math.max(...points.map(p => p[0]));
  if (left === right) [left, right] = [left - 1, right + 1];
  const low = Math.min(0, ...points.map(p => p[1]));
  let high = Math.max(0, ...points.map(p => p[1]));
  if (high - low < 1e-12) high = low + 1;  // one value, or the noise of rounding, must not fill the chart
  const levels = ticks(low, high, 6), bottom = levels[0], top = levels[levels.length - 1];
  return {
    left, right, levels,
    x: value => LEFT + (value - left) / (right - left) * (WIDTH - LEFT - RIGHT),
    y: value => HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM),
  };
}

function grid(axes) {
  const parts = [];
  for (const level of axes.levels) {
    const y = axes.y(level).toFixed(1);
    parts.push(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
    parts.push(svg("text", { x: LEFT - 6, y: Number(y) + 3.5, "text-anchor": "end" }, compact(level)));
  }
  for (const step of ticks(axes.left, axes.right, 6)) {
    if (step !== Math.round(step) || step < axes.left || step > axes.right) continue;
    parts.push(svg("text", { x: axes.x(step).toFixed(1), y: HEIGHT - 7, "text-anchor": "middle" }, compact(step)));
  }
  return parts;
}

const path = (axes, points) => points.map(p => axes.x(p[0]).toFixed(1) + "," + axes.y(p[1]).toFixed(1)).join(" ");

function movingMean(points, radius) {
  return points.map((point, i) => {
    const part = points.slice(Math.max(i - radius, 0), i + radius + 1);
    return [point[0], part.reduce((sum, p) => sum + p[1], 0) / part.length];
  });
}

function drawLines(lines) {
  const axes = frame(lines.flatMap(line => line.points)), parts = grid(axes);
  for (const line of lines) {
    const colour = " c" + line.colour % 7;
    let points = line.points;
    if (points.length >= SMOOTHED_FROM) {
      parts.push(svg("polyline", { class: "raw" + colour, points: path(axes, points) }));
      points = movingMean(points, Math.floor(points.length / 20));
    }
    parts.push(svg("polyline", { class: "line" + colour, points: path(axes, points) }));
    if (points.length <= 16) {
      for (const [x, y] of points) parts.push(svg("circle", { class: "dot" + colour, cx: axes.x(x).toFixed(1), cy: axes.y(y).toFixed(1), r: 3 }));
    }
  }
  return [axes, parts];
}

function drawStack(lines) {
  const values = lines.map(line => new Map(line.points));
  let steps = [...new Set(lines.flatMap(line => line.points.map(p => p[0])))].sort((a, b) => a - b);
  let lower = steps.map(() => 0);
  const areas = lines.map((line, i) => {
    const upper = steps.map((step, at) => lower[at] + Math.max(values[i].get(step) || 0, 0));
    const area = { colour: line.colour, lower, upper };
    lower = upper;
    return area;
  });
  const single = steps.length === 1 ? [steps[0] - 0.5, steps[0] + 0.5] : null;
  const shape = heights => single ? single.map(step => [step, heights[0]]) : steps.map((step, at) => [step, heights[at]]);
  const axes = frame(shape(lower));
  const parts = areas.map(area => svg("polygon", {
    class: "area c" + area.colour % 7, points: path(axes, shape(area.upper)) + " " + path(axes, shape(area.lower).reverse()),
  }));
  return [axes, parts.concat(grid(axes))];
}

// A line at each step from which on other settings were in force; on top, the settings.
function markers(axes, marks) {
  return marks.filter(mark => mark.step >= axes.left && mark.step <= axes.right).map(mark => {
    const x = axes.x(mark.step).toFixed(1);
    const line = svg("line", { class: "change", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM });
    line.append(svg("title", {}, clean("from step " + count(mark.step) + " on: " + mark.settings.join("; "))));
    return line;
  });
}

// One figure; `choose(step)` is called for a click, `marks` are changes of settings.
function chart(spec, choose, marks) {
  const [axes, parts] = spec.kind === "stack" ? drawStack(spec.lines) : drawLines(spec.lines);
  const last = spec.lines.map(line => line.name + " " + compact(line.points[line.points.length - 1][1]));
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": clean(spec.title + ", last values: " + last.join(", ")) });
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  drawing.append(...parts, ...markers(axes, marks), cursor);
  const steps = [...new Set(spec.lines.flatMap(line => line.points.map(p => p[0])))].sort((a, b) => a - b);
  const values = spec.lines.map(line => new Map(line.points));
  const nearest = event => {
    const box = drawing.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * WIDTH;
    return steps.reduce((best, step) => Math.abs(axes.x(step) - x) < Math.abs(axes.x(best) - x) ? step : best, steps[0]);
  };
  drawing.onpointermove = event => {
    const step = nearest(event), x = axes.x(step).toFixed(1);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    const lines = [make("b", "", "step " + count(step))];
    spec.lines.forEach((line, i) => {
      if (values[i].has(step)) lines.push(make("div", "key k" + line.colour % 7, line.name + " " + compact(values[i].get(step))));
    });
    for (const mark of marks) if (mark.step === step) lines.push(make("div", "", "settings changed: " + mark.settings.join("; ")));
    showTip(lines, event.clientX, event.clientY);
  };
  drawing.onpointerleave = () => { hideTip(); cursor.setAttribute("visibility", "hidden"); };
  drawing.onclick = event => choose(nearest(event));
  const figure = make("figure"), legend = make("div", "legend");
  legend.append(...last.map((text, i) => make("span", "key k" + spec.lines[i].colour % 7, text)));
  figure.append(make("figcaption", "", spec.title), make("p", "", spec.note), drawing, legend);
  return figure;
}
