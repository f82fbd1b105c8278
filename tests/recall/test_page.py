from __future__ import annotations

import re

import pytest

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.recall.page import recall_by_age, render, write
from remembering import turns


def test_the_page_draws_the_memory_and_escapes_what_was_said(memory, tmp_path):
    for user, reply in turns(30):
        memory.add_turn(user, reply)
    memory.add(Record(text="<script>alert('x')</script> said nobody"))
    memory.search("garden", 8)
    before = memory.prune(dry_run=True), memory.items.state
    page = write(memory, tmp_path / "page.html").read_text()
    assert (memory.prune(dry_run=True), memory.items.state) == before  # looking changes nothing
    assert page.count('<svg class="plot"') == 4
    assert "<script" not in page
    assert "salience: 61 values" in page
    assert re.search(r"http[s]?://", page) is None
    assert "hashed-words" in page


def test_what_is_found_by_its_own_words_counts(memory):
    for user, _ in turns(40):
        memory.add_turn(user)
    far, share, took = recall_by_age(memory)
    assert len(far) == len(share) == 8
    assert far == sorted(far)
    assert min(share) > 0.5
    assert len(took) == 40


def test_an_empty_memory_has_no_page(memory):
    with pytest.raises(PalimpsestError, match="holds no memories of 'default' to draw"):
        render(memory)
