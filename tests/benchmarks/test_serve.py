"""The benchmark of the server, with few and short replies."""

import json

import pytest

from empathic.benchmarks import serve


@pytest.mark.slow
def test_the_benchmark_measures_both_kinds_of_servers_and_late_turns(tmp_path):
    output = tmp_path / "serve.json"
    options = ["--clients", "1", "2", "--turns", "4", "30", "--tokens", "3", "--repeats", "2", "--output", str(output)]
    result = serve.main(options)
    assert json.loads(output.read_text()) == result
    rows = [(row["clients"], row["max_batch"], row["tokens"]) for row in result["throughput"]]
    assert rows == [(1, 1, 6), (2, 1, 12), (1, 2, 6), (2, 2, 12)]
    early, late = result["turns"]
    assert late["prompt_positions"] - early["prompt_positions"] == 2 * (30 - 4)
    assert abs(late["new_positions"] - early["new_positions"]) < 16


def test_a_history_is_the_same_for_the_same_seed():
    assert serve.talk(3, 1) == serve.talk(3, 1) != serve.talk(3, 2) and len(serve.talk(3, 1)) == 6
