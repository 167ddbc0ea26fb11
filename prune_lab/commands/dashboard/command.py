"""prune-lab dashboard: builds the W&B workspace for a project's runs. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import yaml

from prune_lab.commands.arguments import Arguments
from prune_lab.foundations.errors import UserError
from prune_lab.tracking.wandb_key import find_key, require_key

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


def build(entity: str, project: str, name: str) -> Workspace:
    """Return the workspace; nothing is sent.

    Raises:
        UserError: W&B rejects the name.
    """
    from wandb_workspaces.workspaces import Workspace

    from prune_lab.commands.dashboard import panels

    try:
        return Workspace(
            entity=entity,
            project=project,
            name=name,
            sections=panels.sections(),
            settings=panels.settings(),
            runset_settings=panels.runset(),
        )
    except ValueError as error:
        raise UserError(f"--name {name} is no name of a view: W&B takes text without symbols and emojis") from error


def specification(workspace: Workspace) -> dict[str, Any]:
    """Return the content that W&B would store, without its own names, as plain containers."""
    shown = {"entity", "project", "display_name", "spec"}
    return json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, include=shown))


def save(workspace: Workspace) -> tuple[str, bool]:
    """Store the workspace as the saved view of its name; return its address and whether it existed before.

    W&B identifies views by an internal name, which every client draws at random. Here it is derived from entity,
    project and name. So the same command finds its view again, even after a renaming in W&B, and overwrites all
    changes. Views made by a person are never changed, and the private workspace of a user cannot be written.

    Raises:
        UserError: there is no such project.
        SpecVersionError: the view was saved by a W&B newer than the package wandb-workspaces.
    """
    identity = hashlib.sha256(f"{workspace.entity}/{workspace.project}/{workspace.name}".encode()).hexdigest()[:11]
    stored = _stored_id(workspace, identity)
    workspace._internal_name = f"nw-{identity}-v"  # in the format of W&B's own
    workspace._internal_id = stored or ""  # without it W&B would store a second view
    workspace.save()
    return workspace.url, stored is not None


def _stored_id(workspace: Workspace, identity: str) -> str | None:
    """Return W&B's id of the view, None if there is none yet."""
    from wandb_workspaces.workspaces.internal import get_view_dict

    try:
        return get_view_dict(workspace.entity, workspace.project, identity)["id"]
    except ValueError as error:
        if str(error).startswith("Project "):
            raise UserError(
                f"W&B has no project {workspace.entity}/{workspace.project}, or it is not yours to see; "
                "it begins with the first run that is sent there (prune-lab wandb-sync)"
            ) from error
        return None


def _upload(workspace: Workspace) -> str:
    """Store the workspace, in the account's default entity if it names none; return the line for the reader."""
    import wandb

    if key := find_key():
        os.environ["WANDB_API_KEY"] = key  # wandb-workspaces opens its own sessions, which would prompt for it
    wandb.setup(settings=wandb.Settings(silent=True))
    workspace.entity = workspace.entity or wandb.Api().default_entity or ""
    if not workspace.entity:
        raise UserError("the W&B account has no default entity: say --entity TEAM")
    url, existed = save(workspace)
    return f"workspace {workspace.name!r} {'updated' if existed else 'created'}: {url}"


def main(argv: list[str]) -> int:
    """Store the workspace in W&B, or print it.

    Raises:
        UserError: wrong option, package or key missing, or W&B refused.
    """
    from prune_lab.compose.choices import conf_dir

    default = yaml.safe_load((conf_dir() / "logger" / "default.yaml").read_text())
    parser = Arguments("dashboard", "Build the W&B workspace that compares the runs of a project.")
    parser.add_argument("--project", default=default["project"], help="W&B project (default: %(default)s)")
    parser.add_argument("--entity", default=default["entity"], help="W&B team or user (default: the account's)")
    parser.add_argument("--name", default="prune-lab", help="of the saved view; one of that name is overwritten")
    parser.add_argument("--print", action="store_true", help="write the workspace as JSON; nothing is sent")
    options = parser.parse_args(argv)
    if find_spec("wandb_workspaces") is None:
        raise UserError("prune-lab dashboard needs the package wandb-workspaces: pip install wandb-workspaces")
    if not options.print:
        require_key("prune-lab dashboard", hint="; --print shows the workspace without one")
    workspace = build(options.entity or "", options.project, options.name)
    if options.print:
        print(json.dumps(specification(workspace), indent=2))
        return 0
    try:
        print(_upload(workspace))
    except UserError:
        raise
    except Exception as error:  # wandb raises many types; only their text is useful to the reader
        raise UserError(f"W&B: {' '.join(str(error).split()) or type(error).__name__}") from error
    return 0
