"""Command lines made from dataclasses, and errors of one line instead of a traceback."""
import argparse
import dataclasses
import sys
import typing

HELP = argparse.RawDescriptionHelpFormatter


def option(default, help, **more):
    """A dataclass field that knows its line in --help."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


def add_options(parser, options):
    """One --flag for each field of the dataclass; a bool field is a switch, --flag or --no-flag."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kind, default = hints[field.name], field.default
        shown = "" if default in (None, "", False) else f" (default {default})"
        line = field.metadata["help"] + shown
        if kind is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction,
                                default=default, help=line)
            continue
        kind = next((k for k in typing.get_args(kind) if k is not type(None)), kind)
        choices = field.metadata.get("choices")
        parser.add_argument(f"--{field.name}", type=kind, default=default, help=line,
                            choices=choices, metavar=None if choices else kind.__name__.upper())


def parser(description, **more):
    """An argument parser that keeps the description's own line breaks."""
    return argparse.ArgumentParser(description=description, formatter_class=HELP, **more)


def changed(config, settings):
    """The dataclass with `key=value` settings applied, each read as the field's own type.

    Raises ValueError for a key that is no field (it lists them) or a value of another type.
    """
    hints, values = typing.get_type_hints(type(config)), {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in hints:
            raise ValueError(f"--set {setting}: write key=value with one of "
                             + ", ".join(f.name for f in dataclasses.fields(config)))
        kind = hints[key]
        if kind is dict:
            raise ValueError(f"--set {setting}: {key} is a config of its own, of the run that "
                             f"--{key} names")
        try:
            if kind is bool:
                values[key] = {"true": True, "false": False}[text.lower()]
            elif kind == tuple[int, ...]:                         # "1,2,3", or nothing: ()
                values[key] = tuple(int(number) for number in text.split(",") if text)
            else:
                values[key] = kind(text)
        except (ValueError, KeyError):
            words = kind.__name__ if kind in (bool, int, float, str) else "numbers like 1,2,3"
            raise ValueError(f"--set {setting}: {key} takes {words}, not {text!r}") from None
    return dataclasses.replace(config, **values)


class Commands:
    """The small commands of a model file: MODEL.py RUN COMMAND arguments.

    `add` takes functions whose first parameter is the run folder and whose docstring is the help.
    """

    def __init__(self, description, run="a run folder"):
        self.parser = parser(description)
        self.parser.add_argument("run", metavar="RUN", help=run)
        self.commands = self.parser.add_subparsers(title="commands", metavar="COMMAND",
                                                   required=True)

    def add(self, function, **arguments):
        """A command of the function's name; arguments: parameter=help.

        "... help" takes one or more; "--A B: help" is a flag --parameter A B that may be repeated.
        """
        command = self.commands.add_parser(function.__name__, help=function.__doc__,
                                           description=function.__doc__)
        for name, line in arguments.items():
            if line.startswith("--"):
                names, _, line = line[2:].partition(": ")
                command.add_argument(f"--{name}", action="append", nargs=len(names.split()),
                                     default=[], metavar=tuple(names.split()), help=line)
                continue
            more = {"nargs": "+"} if line.startswith("...") else {}
            command.add_argument(name, metavar=name.upper().rstrip("S") if more else name.upper(),
                                 help=line.removeprefix("...").strip(), **more)
        command.set_defaults(function=function)

    def run(self):
        """Read the command line and call what it names."""
        values = vars(self.parser.parse_args())
        return values.pop("function")(**values)


def run(main):
    """Call main(); a user's mistake (ValueError) ends in one line on stderr and exit status 2.

    So does what the disk refuses (OSError). `python -X dev` shows the whole traceback.
    """
    try:
        sys.exit(main())
    except BrokenPipeError:              # whoever read the output, head say, has had enough
        sys.stderr.close()
        sys.exit(0)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(fail(error))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error):
    """Print one line for a mistake; returns the exit status 2."""
    lines = str(error).splitlines() or [repr(error)]
    # A worker process sends its whole traceback; what went wrong is the last line.
    print("error:", lines[-1].removeprefix("ValueError: "), file=sys.stderr)
    return 2
