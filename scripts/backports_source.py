"""Print the apt source of a Debian backports suite at the mirror that this machine's own sources name.

Usage: python3 scripts/backports_source.py CODENAME [FOLDER]     (FOLDER is /etc/apt)
Prints a deb822 stanza, or nothing when the sources have the suite already. Exit status 1 when no source serves the
release. Reads both formats: one line (`sources.list`, `*.list`) and deb822 (`*.sources`). Standard library only: it
runs before anything is installed. Source: sources.list(5).
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

ALIASES = ("stable", "oldstable")  # what sources may call the release; its mirror has the backports of every release
ONE_LINE = re.compile(r"^\s*(deb|deb-src)\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*(.*)$")


class Source(NamedTuple):
    """One apt source: where it is, which suites and components it serves, and its key ("" for apt's own keys)."""

    types: tuple[str, ...]
    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""


def one_line_sources(text: str) -> list[Source]:
    """Sources of the one-line format, such as `deb [signed-by=KEY] URI SUITE main`."""
    found = []
    for line in text.splitlines():
        match = ONE_LINE.match(line.split("#")[0])
        if match:
            kind, options, uri, suite, components = match.groups()
            pairs = dict(pair.split("=", 1) for pair in (options or "").split() if "=" in pair)
            key = pairs.get("signed-by", "")
            found.append(Source((kind,), (uri,), (suite,), tuple(components.split()), key))
    return found


def deb822_sources(text: str) -> list[Source]:
    """Sources of the deb822 format: stanzas of `Name: value`, where a value goes on in indented lines."""
    found = []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1].isspace():
                fields[name] = f"{fields.get(name, '')}\n{line}"
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("enabled", "yes").strip().lower() in ("no", "false", "0") or "uris" not in fields:
            continue
        types, uris, suites, components = (
            tuple(fields.get(key, "").split()) for key in ("types", "uris", "suites", "components")
        )
        found.append(Source(types, uris, suites, components, fields.get("signed-by", "").rstrip()))
    return found


def read_sources(folder: Path) -> list[Source]:
    """All binary sources that apt reads, in its order."""
    parts = folder / "sources.list.d"
    files = [folder / "sources.list", *(sorted(parts.iterdir()) if parts.is_dir() else [])]
    found: list[Source] = []
    for file in files:
        if not file.is_file() or file.suffix not in (".list", ".sources"):
            continue
        text = file.read_text(errors="replace")
        found += deb822_sources(text) if file.suffix == ".sources" else one_line_sources(text)
    return [source for source in found if "deb" in source.types]


def backports_stanza(sources: list[Source], codename: str) -> str | None:
    """The stanza to add; "" when a source has the suite already, None when none serves the release's main part."""
    suite = f"{codename}-backports"
    if any(suite in source.suites for source in sources):
        return ""
    for source in sources:
        uris = [uri for uri in source.uris if uri.split(":")[0] not in ("cdrom", "copy")]
        if uris and "main" in source.components and {codename, *ALIASES} & set(source.suites):
            key = f"\nSigned-By: {source.signed_by}" if source.signed_by else ""
            return f"Types: deb\nURIs: {uris[0]}\nSuites: {suite}\nComponents: main{key}\n"
    return None


if __name__ == "__main__":
    stanza = backports_stanza(read_sources(Path(sys.argv[2] if len(sys.argv) > 2 else "/etc/apt")), sys.argv[1])
    if stanza is None:
        sys.exit(1)
    sys.stdout.write(stanza)
