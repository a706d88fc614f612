"""`boa-edge devices`: list them, check one, clean one up."""

from __future__ import annotations

from typing import Annotated

import typer

from boa_edge.errors import UsageError
from boa_edge.output import finish

app = typer.Typer(
    help="The devices it knows; `check` tries one, `clean` removes what it keeps there.", invoke_without_command=True
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A name, NAME:TARGET (android:SERIAL, ssh:USER@HOST), or a profile file.")
]


@app.callback()
def list_all(context: typer.Context) -> None:
    """The devices it knows, and which are usable now, and why not."""
    if context.invoked_subcommand is not None:
        return
    from boa_edge.tables import print_devices
    from devices import list_devices

    rows = list_devices()
    print_devices(rows)
    finish(
        {
            "devices": [
                {
                    "name": row.name,
                    "description": row.description,
                    "execution": row.execution,
                    "usable": row.usable,
                    "missing": list(row.missing),
                }
                for row in rows
            ]
        }
    )


@app.command()
def check(name: NameArgument) -> None:
    """Try what a measurement needs: files, a program, a tiny model, clock, memory, probes. Exit code 1: some fail."""
    from boa_edge.tables import print_self_test
    from devices import open_device
    from devices.selftest import self_test

    result = self_test(open_device(name))
    print_self_test(result)
    finish(result.as_dict())
    if not result.works:
        raise typer.Exit(1)


@app.command()
def clean(
    name: NameArgument,
    force: Annotated[bool, typer.Option("--force", help="Also where another machine's run holds the device.")] = False,
) -> None:
    """Remove everything that boa-edge keeps on a device (adb, ssh)."""
    from devices import open_device
    from devices.remote.transport import RemoteTransport

    transport = open_device(name).transport
    if not isinstance(transport, RemoteTransport):
        raise UsageError("nothing is kept on a device that is this machine", where=f"device {name}")
    finish({"device": name, "removed": transport.clean(force=force)})
