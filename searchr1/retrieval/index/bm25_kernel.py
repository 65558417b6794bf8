"""The best passages of a query from BM25's posting lists, without looking at those that cannot be among them.

The words of a query are added up one after the other, those that can add most first (MaxScore: Turtle and Flood 1995,
https://doi.org/10.1016/0306-4573(95)00020-H). As soon as all the words that are left cannot lift a passage that has none of
the words so far into the best k, the long lists of common words are no longer read: they are only looked up for the few
passages that can still win. The scores are the same as if every list had been read.
"""

from __future__ import annotations

import math

import numpy as np

from searchr1.retrieval.index.compiled import numba

LOOKUP_COST = 16
"""Looking up one passage in a list costs about as much as reading so many entries."""
SLACK = 1e-4
"""Bounds are compared with so much room, relatively, for rounding."""
NO_PASSAGE, NOT_ASCENDING, NO_SCORE = 1, 2, 3
"""Problems that `check_lists` returns."""


@numba.njit(cache=True, nogil=True)
def check_lists(data, indices, indptr, rows, first, last):  # type: ignore[no-untyped-def]
    """Return (entry, problem) of the first posting of the words `first:last` that `search_words` must not see.

    A score of Lucene's BM25 is above 0 and below the word's idf. (-1, 0) if all is well.
    """
    for word in range(first, last):
        start, end = indptr[word], indptr[word + 1]
        bound = math.log(1.0 + (rows - (end - start) + 0.5) / (end - start + 0.5)) * (1.0 + SLACK)
        before = -1
        for entry in range(start, end):
            row = indices[entry]
            if row < 0 or row >= rows:
                return entry, NO_PASSAGE
            if row <= before:
                return entry, NOT_ASCENDING
            before = row
            if not 0.0 < data[entry] <= bound:
                return entry, NO_SCORE
    return -1, 0


@numba.njit(cache=True, nogil=True)
def largest_scores(data, indptr):  # type: ignore[no-untyped-def]
    """Return [words] float32: the most that each word adds to any passage."""
    largest = np.zeros(len(indptr) - 1, dtype=np.float32)
    for word in range(len(largest)):
        for entry in range(indptr[word], indptr[word + 1]):
            largest[word] = max(largest[word], data[entry])
    return largest


@numba.njit(cache=True, nogil=True)
def search_words(data, indices, indptr, largest, words, first, topk, scores, touched, best_rows, best_scores, counts):  # type: ignore[no-untyped-def]
    """Find the best passages of several queries, one after the other.

    Args:
        data, indices, indptr: posting lists: word w adds `data[e]` to passage `indices[e]` (ascending) for e in
            `indptr[w]:indptr[w + 1]`. All of `data` is above 0.
        largest: [words] of `largest_scores`.
        words, first: words of query q are `words[first[q]:first[q + 1]]`.
        topk: how many passages.
        scores: [rows] float32, zeros; zeros again afterwards.
        touched: [rows] int32, any contents.
        best_rows, best_scores: [queries, topk], filled; best first, the lower row first among equal scores.
        counts: [queries] how many were found.
    """
    for query in range(len(first) - 1):
        terms = words[first[query] : first[query + 1]]
        terms = terms[np.argsort(-largest[terms], kind="mergesort")]
        left = np.float32(0.0)
        for term in terms:
            left += largest[term]
        number = 0
        done = np.float32(0.0)
        threshold = np.float32(0.0)
        for term in terms:
            start, end = indptr[term], indptr[term + 1]
            if left >= threshold * (1.0 - SLACK):
                for entry in range(start, end):
                    row = indices[entry]
                    if scores[row] == 0.0:
                        touched[number] = row
                        number += 1
                    scores[row] += data[entry]
            else:
                number = keep_promising(scores, touched, number, threshold * (1.0 - SLACK) - left)
                if number * LOOKUP_COST < end - start:
                    for place in range(number):
                        row = touched[place]
                        entry = lower_bound(indices, start, end, row)
                        if entry < end and indices[entry] == row:
                            scores[row] += data[entry]
                else:
                    for entry in range(start, end):
                        if scores[indices[entry]] != 0.0:
                            scores[indices[entry]] += data[entry]
            left -= largest[term]
            done += largest[term]
            if number >= topk and left < done:  # no score is above `done`, so before this the threshold says nothing
                threshold = kth_largest(scores, touched, number, topk, best_scores[query])
        found = 0
        for place in range(number):
            row = touched[place]
            found = insert(best_rows[query], best_scores[query], found, topk, row, scores[row])
            scores[row] = 0.0
        counts[query] = found


@numba.njit(cache=True, nogil=True, inline="always")
def keep_promising(scores, touched, number, least):  # type: ignore[no-untyped-def]
    """Drop the touched passages whose score is below `least`; returns how many remain."""
    kept = 0
    for place in range(number):
        row = touched[place]
        if scores[row] < least:
            scores[row] = 0.0
        else:
            touched[kept] = row
            kept += 1
    return kept


@numba.njit(cache=True, nogil=True, inline="always")
def lower_bound(indices, low, high, row):  # type: ignore[no-untyped-def]
    """Return the first place in `indices[low:high]`, which ascends, that is not below `row`."""
    while low < high:
        middle = (low + high) // 2
        if indices[middle] < row:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(cache=True, nogil=True, inline="always")
def insert(best_rows, best_scores, found, topk, row, score):  # type: ignore[no-untyped-def]
    """Put a passage where it belongs among the best so far; returns how many there are."""
    if found == topk:
        last = best_scores[topk - 1]
        if score < last or (score == last and row > best_rows[topk - 1]):
            return found
        found -= 1
    low, high = 0, found
    while low < high:
        middle = (low + high) // 2
        if best_scores[middle] > score or (best_scores[middle] == score and best_rows[middle] < row):
            low = middle + 1
        else:
            high = middle
    for place in range(found, low, -1):
        best_rows[place] = best_rows[place - 1]
        best_scores[place] = best_scores[place - 1]
    best_rows[low] = row
    best_scores[low] = score
    return found + 1


@numba.njit(cache=True, nogil=True)
def kth_largest(scores, touched, number, topk, workspace):  # type: ignore[no-untyped-def]
    """Return the topk-th largest of the scores of the first `number` touched rows."""
    found = 0
    for place in range(number):
        score = scores[touched[place]]
        if found == topk:
            if score <= workspace[topk - 1]:
                continue
            found -= 1
        slot = found
        while slot > 0 and workspace[slot - 1] < score:
            workspace[slot] = workspace[slot - 1]
            slot -= 1
        workspace[slot] = score
        found += 1
    return workspace[topk - 1]
