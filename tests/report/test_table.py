import io

from report_example import full, small, with_seeds
from rich.console import Console

from palimpsest.report.metrics import KEY, metric, p_value
from palimpsest.report.table import build, to_markdown, to_rich


def test_rows_follow_sections_and_columns_end_with_gold():
    table = build(full())
    assert [model.part for model in table.models] == ["before", "erased", "erased", "erased", "control", "gold"]
    assert [model.name for model in table.models if model.judged] == ["npo"]
    sections = [measure.section for measure in table.measures]
    assert sections == sorted(
        sections, key=["Forgetting", "Being found out", "What must stay", "Health of the text"].index
    )


def test_a_cell_has_its_interval_n_and_closeness_to_gold():
    table = build(small())
    cell = table.cells["rouge/forget", "npo"]
    assert (cell.text, cell.interval, cell.n, cell.closeness) == ("0.31", "0.26, 0.36", 20, "at")
    assert table.cells["rouge/forget", "before"].closeness == "far"
    assert table.cells["rouge/forget", "gold"].closeness is None


def test_without_gold_no_cell_claims_to_be_close_to_it():
    assert {cell.closeness for cell in build(small(gold={})).cells.values()} == {None}


def test_markdown_by_models_and_by_metrics():
    table = build(small(), ["rouge/forget", "auc/min-k"])
    assert to_markdown(table) == (
        "| model | Recall, forget ↓ (n=20) | AUC Min-K% ≈ (n=20) |\n"
        "| :-- | --: | --: |\n"
        "| Before | 0.95 [0.90, 1.00] | 0.98 [0.93, 1.00] |\n"
        "| NPO | 0.31 [0.26, 0.36] | 0.52 [0.47, 0.57] |\n"
        "| Gold | 0.29 [0.24, 0.34] | 0.50 [0.45, 0.55] |\n"
    )
    assert to_markdown(table, by="metrics").splitlines()[0] == "| metric | Before | NPO | Gold |"


def test_what_was_not_measured_is_a_dash_and_pipes_are_escaped():
    evidence = small({"privleak": -3.2})
    assert "| \N{EM DASH} |" in to_markdown(build(evidence))
    assert "\N{MINUS SIGN}3.2" in to_markdown(build(evidence))
    assert "a\\|b" in to_markdown(build(type(evidence)(title="t", models=(_named(evidence.models[1], "a|b"),))))


def test_in_a_narrow_terminal_words_stay_whole_and_intervals_are_left_out():
    table = build(full(), KEY)
    for width, intervals in ((80, False), (400, True)):
        stream = io.StringIO()
        Console(file=stream, width=width).print(to_rich(table, width=width))
        told = stream.getvalue()
        assert ("[" in told) == intervals
        assert ("in the report" in told) != intervals
        assert all(len(line) <= width for line in told.splitlines())
        names = [model.title if intervals else model.name for model in table.models]
        assert all(name in told for name in names)
    few = build(full(), KEY[:3])
    stream = io.StringIO()
    Console(file=stream, width=60).print(to_rich(few, width=60))
    assert all(model.name in stream.getvalue() for model in few.models)


def test_the_terminal_table_shows_text_as_it_is():
    stream = io.StringIO()
    evidence = small()
    evidence = type(evidence)(title="t", models=(_named(evidence.models[1], "[red]x[/red]"), evidence.models[2]))
    Console(file=stream, width=160).print(to_rich(build(evidence, KEY), title="all [bold]of it"))
    assert "[red]x[/red]" in stream.getvalue()
    assert "0.31 [0.26, 0.36]" in stream.getvalue()


def test_over_seeds_is_said():
    assert build(with_seeds(small(), (-0.01, 0.0, 0.01))).over == "3 seeds"
    assert build(small()).over == "examples"


def test_an_unknown_value_still_has_a_row():
    table = build(small({"new_probe/odd": 0.4}))
    assert table.measures[-1].title == "new probe, odd"
    assert table.measures[-1].section == "Other"


def test_numbers_are_written_for_readers():
    assert (p_value(0.43), p_value(0.0012), p_value(3.1e-19)) == ("0.43", "0.0012", "3.1×10⁻¹⁹")
    assert metric("perplexity/general").show(18.34) == "18.3"
    assert metric("rouge/forget").show(float("nan")) == "\N{EM DASH}"
    assert [metric("gain/forget").show(x) for x in (-0.004, -0.3)] == ["0.00", "\N{MINUS SIGN}0.30"]


def test_closeness_is_relative_for_perplexity_and_a_test_for_forget_quality():
    assert [metric("perplexity/general").closeness(x, 20.0) for x in (20.9, 22.0, 40.0)] == ["at", "near", "far"]
    assert [metric("forget_quality").closeness(x, 1.0) for x in (0.05, 0.01, 1e-6)] == ["at", "near", "far"]


def _named(model, title):
    import dataclasses

    return dataclasses.replace(model, title=title)
