"""Train a patch for one category from Python; a real run takes some hundred steps, this one only shows the way."""

import tempfile

import safepatch

with tempfile.TemporaryDirectory() as folder:
    config = safepatch.load_train_config(
        None,
        ["category=alcohol", f"output={folder}", "training.steps=2", "training.batch_size=2", "data.pairs=4"],
    )
    path = safepatch.train(safepatch.load_pipeline("tiny-sd"), config)
    info = safepatch.verify(path)

print(info.instructions)
assert info.categories == ("alcohol",)
