"""`urlfast COMMAND`, which is `python -m urlfast.COMMAND`."""

import importlib
import os
import sys

from urlfast import __version__

COMMANDS = {
    "train": "pre-train without reward, or train on a game's own",
    "transfer": "fine-tune a pre-trained run on its game's reward",
    "sweep": "a list of them, with seeds, one after the other or side by side, and a report",
    "evaluate": "score and coverage of a run, beside a random policy",
    "report": "one HTML page of a run or several",
    "info": "what this installation has and can use",
}


def main() -> None:
    try:
        run(sys.argv[1:])
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except KeyboardInterrupt:  # while a command's libraries were loading; commands see to the rest
        sys.exit(130)


def run(argv: list[str]) -> None:
    if argv == ["--version"]:
        print(f"urlfast {__version__}")
    elif not argv or argv[0] in ("-h", "--help"):
        print("usage: urlfast COMMAND ... | --version\n")
        print("\n".join(f"  {name:10}{says}" for name, says in COMMANDS.items()))
        print("\n`urlfast COMMAND --help` says more.", flush=True)
    elif argv[0] in COMMANDS:
        importlib.import_module(f"urlfast.{argv[0]}").main(argv[1:])
    else:
        import difflib

        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        print(f"urlfast: unknown command {argv[0]!r}{hint} (known: {', '.join(COMMANDS)})", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
