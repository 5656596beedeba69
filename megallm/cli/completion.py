"""`megallm completion SHELL`: a script that completes verbs, options and files, made from the table
of verbs.
"""

from __future__ import annotations

import argparse
import importlib

from megallm.cli.table import VERBS, Command

SHELLS = ("bash", "zsh", "fish")
HOW = {
    "bash": "megallm completion bash > ~/.local/share/bash-completion/completions/megallm",
    "zsh": "megallm completion zsh > a file named _megallm in a folder of $fpath",
    "fish": "megallm completion fish > ~/.config/fish/completions/megallm.fish",
}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def _run(args: argparse.Namespace) -> int:
    print(script(args.shell), end="")
    return 0


def options() -> dict[str, list[tuple[str, str]]]:
    """Returns verb -> (option, help) of each of its long options, as its own parser declares them.
    """
    found = {}
    for words, verb in VERBS.items():
        parser = argparse.ArgumentParser(add_help=True)
        importlib.import_module(verb.module).COMMANDS[words].arguments(parser)
        rows = []
        for action in parser._actions:  # argparse has no public list of them
            if action.help != argparse.SUPPRESS:
                rows += [
                    (name, action.help or "")
                    for name in action.option_strings
                    if name.startswith("--")
                ]
        found[words] = rows
    return found


def first_words() -> dict[str, list[str]]:
    """Returns first word of a verb -> second words ([] for verbs of one word)."""
    found: dict[str, list[str]] = {}
    for words in VERBS:
        first, _, second = words.partition(" ")
        found.setdefault(first, [])
        if second:
            found[first].append(second)
    return found


def script(shell: str) -> str:
    """Returns the completion script of one shell."""
    head = f"# Completion of megallm for {shell}. {HOW[shell]}\n"
    first = "#compdef megallm\n" if shell == "zsh" else ""  # compinit looks at the first line only
    return first + head + {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def _cases(indent: str, variable: str) -> str:
    """Branches of a shell's `case`: the words before the cursor -> what may follow."""
    choices = {first: list(seconds) for first, seconds in first_words().items() if seconds}
    for words, rows in options().items():
        choices.setdefault(words, []).extend(name for name, _ in rows)
    return "\n".join(
        f"{indent}'{words}') {variable}='{' '.join(names)}' ;;" for words, names in choices.items()
    )


def _bash() -> str:
    firsts = " ".join(first_words())
    seconds = "|".join(words for words in VERBS if " " in words)
    return f"""_megallm() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} words verb=${{COMP_WORDS[1]-}}
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    words='{firsts} --help --version'
  else
    if [ "$COMP_CWORD" -gt 2 ]; then
      case "$verb ${{COMP_WORDS[2]}}" in '{seconds.replace("|", "'|'")}') verb="$verb ${{COMP_WORDS[2]}}" ;; esac
    fi
    words=
    case "$verb" in
{_cases("      ", "words")}
    esac
    [[ "$current" == -* ]] || COMPREPLY=($(compgen -f -- "$current"))
  fi
  COMPREPLY+=($(compgen -W "$words" -- "$current"))
}}
complete -o filenames -F _megallm megallm
"""


def _zsh() -> str:
    firsts = " ".join(first_words())
    seconds = "|".join(f"'{words}'" for words in VERBS if " " in words)
    return f"""_megallm() {{
  local list verb=${{words[2]-}} before=$CURRENT
  local -a line=("${{words[@]}}")
  if (( before == 2 )); then
    compadd -- {firsts} --help --version
    return
  fi
  if (( before > 3 )); then
    case "$verb ${{line[3]}}" in {seconds}) verb="$verb ${{line[3]}}" ;; esac
  fi
  list=
  case "$verb" in
{_cases("    ", "list")}
  esac
  compadd -- ${{=list}}
  _files
}}
if [ "$funcstack[1]" = _megallm ]; then _megallm "$@"; else compdef _megallm megallm; fi
"""


def _fish() -> str:
    lines = ["complete -c megallm -n __fish_use_subcommand -l version -d 'print the version'"]
    texts = {words: verb.help for words, verb in VERBS.items()}
    for first, seconds in first_words().items():
        text = texts.get(first, "; ".join(f"{second}" for second in seconds))
        lines.append(f"complete -c megallm -n __fish_use_subcommand -a {first} -d {_quoted(text)}")
        for second in seconds:
            condition = (
                f"__fish_seen_subcommand_from {first}; and not __fish_seen_subcommand_from "
                f"{' '.join(seconds)}"
            )
            text = _quoted(texts[f"{first} {second}"])
            lines.append(f"complete -c megallm -n {_quoted(condition)} -a {second} -d {text}")
    for words, rows in options().items():
        condition = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in words.split())
        for name, text in rows:
            lines.append(
                f"complete -c megallm -n {_quoted(condition)} -l {name[2:]} -d {_quoted(text)}"
            )
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A word for fish, in single quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("%%", "%") + "'"


COMMANDS = {"completion": Command(_arguments, _run)}
