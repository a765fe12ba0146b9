"""``python -m benchmarks``: the table of all committed records."""

from benchmarks.measuring import committed_records, targets_table

if __name__ == "__main__":
    print(targets_table(committed_records()))
