"""What the benchmark of decisions measures."""

from bench import route


def test_texts_are_the_same_each_time_and_of_every_length():
    """Two runs measure the same texts, short and long."""
    made = route.texts(22)
    assert made == route.texts(22)
    assert sorted({len(text) for text in made}) == sorted(route.LENGTHS)


def test_every_figure_is_there(capsys, monkeypatch):
    """The object has the median and the slowest hundredth of each kind of decision."""
    found = route.measured(110)
    assert {"p50_us", "p99_us", "structure_p50_us", "prepare_text_p50_us", "prepare_structure_p99_us"} <= found.keys()
    assert all(found[name] > 0 for name in found if name.endswith("_us"))
    assert set(found["by_chars"]) == set(route.LENGTHS)
