"""`empathic prepare`: a corpus as it was downloaded -> a data set."""

from empathic.commands import add_command


def run(arguments) -> int:
    from empathic.data_prep.folder import prepare_folder

    report = prepare_folder(
        arguments.raw,
        arguments.out,
        embed=arguments.embed,
        num_workers=arguments.num_workers,
        split_seed=arguments.split_seed,
    )
    print(f"{report['rows']} turns are in {arguments.out}.")
    for kind in ("left_out", "repaired"):
        for entry in report[kind][:10]:
            print(f"{kind.replace('_', ' ')}: {entry['item']}: {entry['reason']}")
        if len(report[kind]) > 10:
            print(f"... {len(report[kind]) - 10} more {kind.replace('_', ' ')}; all are in report.json.")
    return 0 if report["rows"] else 1


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "prepare",
        run,
        "turn a folder of recordings with a metadata.jsonl into a data set",
        "empathic prepare folder recordings data/recordings --num-workers 2",
    )
    sub.add_argument("corpus", choices=("folder",), help="layout of RAW: folder (your own recordings)")
    sub.add_argument("raw", metavar="RAW", help="folder that holds metadata.jsonl")
    sub.add_argument("out", metavar="OUT", help="folder to write; `datasets.load_dataset(OUT)` reads it")
    sub.add_argument("--embed", action="store_true", help="put the media's bytes into the data set")
    sub.add_argument("--num-workers", type=int, default=1, help="processes that probe clips (%(default)s)")
    sub.add_argument("--split-seed", type=int, default=0, help="decides the split where none is given (%(default)s)")
