import json

import pytest

from benches.step import table


def test_step_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="no summary.json; give the folder of a finished run"):
        table(tmp_path)
    summary = {"step": 4, "images": 40, "seconds": 10.0, "seconds_by_part": {"text": 1.0, "backward": 5.0, "checkpoint": 9.0}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "recipe.json").write_text(json.dumps({"precision": "bf16", "stages": [{"batch_size": 10}]}))
    rows = [(row["part"], row["seconds_per_step"], row["images_per_s"]) for row in table(tmp_path)]
    assert rows == [("backward", "1.2500", "8"), ("text", "0.2500", "40"), ("whole step", "2.5000", "4")]
