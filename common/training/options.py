"""Command lines made from dataclasses and functions; a user's mistake is one line, no traceback."""
import argparse
import dataclasses
import inspect
import math
import os
import signal
import sys
import time
import typing


def option(default, help, **more):
    """A dataclass field with its line of --help; more: choices, flag (its name on the command
    line), append=True for a list that grows with each use."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


def parser(description, **more):
    """An argument parser that keeps the line breaks of the description."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **more)


def add_options(parser, options):
    """One --flag for each field of a dataclass; a bool field is a switch, --flag or --no-flag."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kind, more = hints[field.name], dict(field.metadata)
        default = "" if field.default in (None, "", False, ()) else f" (default {field.default})"
        line, flag = more.pop("help") + default, more.pop("flag", field.name)
        if more.pop("append", False):
            more |= {"action": "append", "metavar": more["metavar"]}
        elif kind is bool:
            more |= {"action": argparse.BooleanOptionalAction}
        else:
            more["type"] = next((k for k in typing.get_args(kind) if k is not type(None)), kind)
            if "choices" not in more:
                more["metavar"] = more["type"].__name__.upper()
        default = [] if field.default == () else field.default
        parser.add_argument(f"--{flag}", dest=field.name, default=default, help=line, **more)


def with_settings(config, settings):
    """The config dataclass with `key=value` settings, each read as the type of its field.

    Raises ValueError for a key that is no field (it lists them) or a value of another type.
    """
    hints, values = typing.get_type_hints(type(config)), {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in hints:
            raise ValueError(f"--set {setting}: write key=value with one of "
                             + ", ".join(f.name for f in dataclasses.fields(config)))
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            raise ValueError(f"--set {setting}: {key} is the config of another run; "
                             f"--from {key}=RUN names it")
        try:
            if kind is bool:
                values[key] = {"true": True, "false": False}[text.lower()]
            elif kind == tuple[int, ...]:                             # "1,2,3", or nothing: ()
                values[key] = tuple(int(number) for number in text.split(",") if text)
            else:
                values[key] = kind(text)
        except (ValueError, KeyError):
            words = kind.__name__ if kind in (bool, int, float, str) else "numbers like 1,2,3"
            raise ValueError(f"--set {setting}: {key} takes {words}, not {text!r}") from None
    return dataclasses.replace(config, **values)


def check_fields(config, choices=None, least=None, most=None):
    """Raise ValueError for a field of a config dataclass that no model can have.

    choices: {name: allowed values}. least: {name: minimum} of numbers; of other integers it is 1.
    most: {name: maximum}.
    """
    for name, allowed in (choices or {}).items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)} is not one of {', '.join(allowed)}")
    for name, value in vars(config).items():
        minimum = (least or {}).get(name, 1 if type(value) is int else -math.inf)
        if type(value) in (int, float) and not value >= minimum:
            raise ValueError(f"{name}={value}: must be at least {minimum}")
        if name in (most or {}) and not value <= most[name]:
            raise ValueError(f"{name}={value}: must be at most {most[name]}")


def run_command(description, *functions):
    """The commands of a model file: MODEL.py RUN COMMAND arguments, one command for each function.

    A signature is a command line: first RUN, *names takes one or more arguments, a keyword-only
    parameter is a --flag; a tuple annotation names the values of a flag that may be given again.
    """
    main = parser(description)
    main.add_argument("run", metavar="RUN", help="a run folder, or published weights")
    commands = main.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for function in functions:
        command = commands.add_parser(function.__name__, help=function.__doc__,
                                      description=function.__doc__)
        command.set_defaults(function=function)
        for p in list(inspect.signature(function).parameters.values())[1:]:
            if p.kind is p.KEYWORD_ONLY and isinstance(p.annotation, tuple):
                command.add_argument(f"--{p.name}", action="append", nargs=len(p.annotation),
                                     default=[], metavar=p.annotation)
            elif p.kind is p.KEYWORD_ONLY:
                command.add_argument(f"--{p.name}", default=p.default,
                                     type=str if p.default is None else type(p.default))
            else:
                many = {"nargs": "+"} if p.kind is p.VAR_POSITIONAL else {}
                command.add_argument(p.name, metavar=p.name.upper().rstrip("S"), **many)
    values = vars(main.parse_args())
    function = values.pop("function")
    given = inspect.signature(function).parameters
    positional = []
    for name, p in given.items():
        if p.kind is not p.KEYWORD_ONLY:
            value = values.pop(name)
            positional += value if p.kind is p.VAR_POSITIONAL else [value]
    return function(*positional, **values)


def run_main(main):
    """Call main(); a user's mistake (ValueError) or the disk's (OSError) is one line on stderr.

    The exit status is then 2. `python -X dev` shows the whole traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:    # of common, while torch was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except BrokenPipeError:              # a reader such as `head` has closed the pipe
        sys.stderr.close()
        sys.exit(0)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        if os.environ.get("RANK", "0") != "0":       # torchrun ends this process in that time when
            time.sleep(3)                            # process 0 has told the same mistake already
        # A worker process sends a whole traceback; its last line is the message.
        lines = str(error).splitlines() or [repr(error)]
        print("error:", lines[-1].removeprefix("ValueError: "), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
