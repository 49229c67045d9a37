"""Checkpoints as a forger would leave them: signed anew, or with a pickle that calls something."""

import json

from urlfast import checkpoint, ops


class Call:
    """What a pickle of it calls when it is read."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def sign(folder, **changes):
    """Gives a checkpoint the checksums of what its files are now; then `changes` to its manifest, which are signed too."""
    replay = json.loads((folder / "replay.json").read_text())
    (folder / "replay.json").write_text(json.dumps({**replay, "crc32c": ops._manifest_crc(replay)}))
    body = json.loads((folder / "manifest.json").read_text())
    body.pop("sha256", None)
    if isinstance(body.get("files"), dict):
        body["files"] |= {name: checkpoint._digest(folder / name) for name in ("state.pt", "replay.json") if name in body["files"]}
        body["files"] |= changes.pop("files", {})
    body |= changes
    (folder / "manifest.json").write_text(json.dumps({**body, "sha256": checkpoint._own_digest(body)}))
