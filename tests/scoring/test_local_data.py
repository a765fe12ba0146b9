import json

import pytest

from rap_env.artifacts import read_rows
from rap_env.errors import CorpusError
from rap_env.scoring.lm_eval_tasks import TASK_FIELDS

pytest.importorskip("lm_eval")

from rap_env.scoring import lm_eval_tasks
from tests.scoring.local_tasks import ROWS, write_task


def load(root, name, **settings):
    config = lm_eval_tasks.TaskConfig((name,), data_root=root, **settings)
    with lm_eval_tasks.quiet():
        return lm_eval_tasks.load_task(name, config)


def test_the_test_split_is_scored_where_there_is_one(tmp_path):
    write_task(tmp_path, "arc_easy")
    write_task(tmp_path, "arc_easy", split="test", count=5)
    task = load(tmp_path, "arc_easy")
    assert len(task.eval_docs) == 5


def test_fewshot_examples_come_from_the_train_file(tmp_path):
    write_task(tmp_path, "copa")
    write_task(tmp_path, "copa", split="train", count=4)
    task = load(tmp_path, "copa", num_fewshot=2)
    task.build_all_requests(limit=1, rank=0, world_size=1)
    assert task.instances[0].args[0].count("a b because") == 3


def test_a_missing_root_folder_or_file_is_named(tmp_path):
    with pytest.raises(CorpusError, match="data_root .* is not a folder"):
        load(tmp_path / "nowhere", "piqa")
    with pytest.raises(CorpusError, match="has no folder 'piqa'; add piqa/SPLIT.jsonl"):
        load(tmp_path, "piqa")
    (tmp_path / "sciq").mkdir()
    with pytest.raises(CorpusError, match="holds nothing"):
        load(tmp_path, "sciq")
    write_task(tmp_path, "sciq", split="train")
    with pytest.raises(CorpusError, match="which holds train.jsonl; add the file"):
        load(tmp_path, "sciq")


@pytest.mark.parametrize("name", ["arc_easy", "blimp_causative"])
def test_each_missing_field_is_named(tmp_path, name):
    for field in TASK_FIELDS["blimp" if name.startswith("blimp_") else name]:
        row = json.loads(json.dumps(ROWS[name]))
        outer, _, inner = field.partition(".")
        del (row[outer] if inner else row)[inner or outer]
        write_task(tmp_path, name, rows=[ROWS[name], row])
        with pytest.raises(CorpusError, match=rf"Line 2 of .*\.jsonl lacks the field '{field}'"):
            load(tmp_path, name)


def test_damaged_files_are_named_with_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": ')
    with pytest.raises(CorpusError, match="Line 3 of .* is not a JSON object .*may be truncated"):
        read_rows(path)
    path.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(CorpusError, match=r"Line 2 of .* is not a JSON object, but '\[2\]'"):
        read_rows(path)
    path.write_text("\n")
    with pytest.raises(CorpusError, match="has no rows"):
        read_rows(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CorpusError, match="Cannot read .* as UTF-8"):
        read_rows(path)


def test_rows_keep_line_separators_inside_strings(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x\u2028y"}\n', encoding="utf-8")
    assert read_rows(path) == [{"a": "x\u2028y"}]


def test_columns_of_mixed_types_are_rejected(tmp_path):
    row = {**ROWS["piqa"], "label": "one"}
    write_task(tmp_path, "piqa", rows=[ROWS["piqa"], row])
    with pytest.raises(CorpusError, match="data of the task 'piqa' in .*ArrowInvalid"):
        load(tmp_path, "piqa")
