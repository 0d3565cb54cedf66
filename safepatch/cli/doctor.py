"""The verb that looks at the installation: doctor."""

from safepatch.cli import app, say


@app.command()
def doctor() -> None:
    """Versions, devices, caches, extras, and which training runs fit this machine."""
    from safepatch.doctor import examined

    for line in examined():
        say(line)
