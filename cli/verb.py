# SPDX-License-Identifier: Apache-2.0
"""A verb of the command line, made of a dataclass of options and a function that takes it."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from jai.errors import UserError
from jai.options import Option, Size, default_text, expected_text, option_text_parser, options_of, read_options_file

# Everything after the verb goes to another program's parser: its options are that program's, and so is its help.
PASS_THROUGH: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "add_help_option": False,
}


@dataclass
class Verb:
    """A command, for the reference page and for tests of every option.

    Attributes:
        name: as it is typed after `jai`.
        options: the dataclass of its options.
        help: what it does.
        config: example of a file for `--config`; None where it takes none.
        examples: commands that its help shows.
        run: the function that takes the options.
    """

    name: str
    options: type
    help: str
    config: str | None
    examples: tuple[str, ...]
    run: Callable[[Any], None]


VERBS: list[Verb] = []
_LONGEST_CHOICES = 50  # characters that stand beside a flag in 80 columns
_METAVARS = {int: "INTEGER", float: "FLOAT", str: "TEXT", Path: "PATH"}


class _PlainValues:
    """Commands and groups that leave values as they are given, for the options read them.

    typer makes a pydantic model of each parameter, given or not: 0.1 s of processor time and 10 MB, which no error is
    worth. Nothing public turns that off (typer 0.29).
    """

    def get_params(self, ctx: Any) -> list[Any]:
        parameters = super().get_params(ctx)  # type: ignore[misc]
        for each in parameters:
            if "process_value" not in vars(each):
                each.process_value = partial(_given_value, each, each.process_value)
        return parameters


def _given_value(parameter: Any, process_value: Callable[[Any, Any], Any], context: Any, value: Any) -> Any:
    is_missing = parameter.required and parameter.value_is_missing(value)
    if is_missing or isinstance(value, bool):  # flags are no trouble, and it says best what is missing
        return process_value(context, value)
    if value is None and (parameter.multiple or parameter.nargs == -1):
        value = ()
    return parameter.callback(context, parameter, value) if parameter.callback else value


class PlainGroup(_PlainValues, TyperGroup):
    """The program, or a group of verbs."""


class _VerbCommand(_PlainValues, TyperCommand):
    """A command whose help has its arguments by name, without hidden ones, and its examples as they are typed."""

    examples: tuple[str, ...] = ()

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        names = []
        for each in self._shown_arguments(ctx):
            dots = "..." if each.nargs == -1 else ""
            names.append(f"{each.metavar}{dots}" if each.required else f"[{each.metavar}{dots}]")
        return ["[OPTIONS]", *names]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        arguments = [(each.metavar, each.help) for each in self._shown_arguments(ctx)]
        options = [each.get_help_record(ctx) for each in self.get_params(ctx) if each.param_type_name == "option"]
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.examples:
            with formatter.section("Examples" if len(self.examples) > 1 else "Example"):
                for line in "\n".join(self.examples).splitlines():
                    formatter.write(f"  {line}\n")

    def _shown_arguments(self, ctx: Any) -> list[Any]:
        return [each for each in self.get_params(ctx) if each.param_type_name == "argument" and not each.hidden]


def verb(
    app: typer.Typer,
    options: type,
    *,
    name: str | None = None,
    group: tuple[str, ...] = (),
    config: str | None = None,
    examples: tuple[str, ...] = (),
) -> Callable:
    """Register a function of one options object as a command: `@verb(app, ConvertOptions)`.

    Args:
        app: the application or group.
        options: the dataclass; each of its options is one of the command's.
        name: of the command; None is the function's.
        group: the words between `jai` and the command.
        config: example of a file for `--config`, which takes the options from a YAML file; None has no such option.
        examples: commands for the help, whole, in lines of at most 78 characters.
    """

    def register(run: Callable[[Any], None]) -> Callable[[Any], None]:
        command_name = name or run.__name__.replace("_", "-")
        registered = Verb(" ".join([*group, command_name]), options, run.__doc__ or "", config, examples, run)
        VERBS.append(registered)

        def command(**given: Any) -> None:
            registered.run(_read(registered, given))

        parameters = _parameters(options, config)
        command.__doc__ = run.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        shown = type("VerbCommand", (_VerbCommand,), {"examples": examples})
        app.command(command_name, cls=shown)(command)
        return run

    return register


def _read(registered: Verb, given: dict[str, Any]) -> Any:
    """The options object: what the command line gives wins over the file, and that over the defaults."""
    options = registered.options
    file = given.pop("config") if registered.config else None
    for each in options_of(options).values():
        if each.info.spread:
            given[each.name] = [*(given[each.name] or ()), *(given.pop(_rest_name(each)) or ())] or None
    values = read_options_file(Path(file), options) if file is not None else {}
    values |= {name: _from_text(options_of(options)[name], value) for name, value in given.items() if value is not None}
    missing = [each for each in options_of(options).values() if each.default is MISSING and each.name not in values]
    if missing:
        raise UserError(f"{missing[0].flag} is not given. Expected: {missing[0].info.help}")
    return options(**values)


def _from_text(option: Option, value: Any) -> Any:
    """The value of an option from the command line's text; of what is checked once it is made, the text itself."""
    try:
        if _is_text(option):
            return option_text_parser(option)(value)
        return option.kind(value) if option.kind in (int, float) else value
    except ValueError:
        raise UserError(
            f"{option.flag} is {value!r}; expected {expected_text(option, on_command_line=True)}."
        ) from None


def _is_text(option: Option) -> bool:
    """Whether the command line writes the option's value in a form of its own, such as 1,2,1 for a list."""
    return option.info.parse is not None or option.element in (int, float)


def _parameters(options: type, config: str | None) -> list[inspect.Parameter]:
    found = options_of(options)
    parameters = [_parameter(each) for each in found.values()]
    # An option takes one value: those after the first of `--models A B` arrive in a hidden argument, which comes last.
    for each in found.values():
        if each.info.spread:
            hidden = typer.Argument(metavar=each.info.metavar, hidden=True)
            parameters.append(_keyword(_rest_name(each), list[str] | None, hidden, None))
    if config:
        help_text = f"YAML file with any of these options, such as {config}; the command line wins."
        parameters.append(_keyword("config", Path | None, typer.Option(metavar="FILE", help=help_text), None))
    return parameters


def _parameter(option: Option) -> inspect.Parameter:
    info = option.info
    kind = str if _is_text(option) or option.kind is Size else option.kind
    is_required = option.default is MISSING
    if info.positional:
        name = str(info.metavar).removesuffix("...")  # which typer adds where it belongs
        declared: Any = typer.Argument(metavar=name, help=_help(option), show_default=False)
        return _keyword(option.name, kind if is_required else kind | None, declared, ... if is_required else None)
    names = [option.flag]
    if kind is bool:
        names = [f"{option.flag}/--no-{option.flag.removeprefix('--')}"]
    metavar, help_text = info.metavar or _METAVARS.get(kind), _help(option)
    if option.choices:
        metavar = f"[{'|'.join(option.choices)}]"
        if len(metavar) > _LONGEST_CHOICES:
            metavar, help_text = "NAME", f"{help_text} One of: {', '.join(option.choices)}."
    declared = typer.Option(*names, metavar=metavar, help=help_text, show_default=False)
    return _keyword(option.name, kind | None if get_origin(kind) is not list else list[str] | None, declared, None)


def _keyword(name: str, kind: Any, declared: Any, default: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is ... else default
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared]
    )


def _help(option: Option) -> str:
    if option.default is MISSING:
        return option.info.help if option.info.positional else f"{option.info.help} [required]"
    default = default_text(option)
    return f"{option.info.help} [default: {default}]" if default else option.info.help


def _rest_name(option: Option) -> str:
    return f"more_{option.name}"
