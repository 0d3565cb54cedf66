"""Train a patch for one category from Python; a real run takes some hundred steps, this one only shows the way."""

import tempfile

import safepatch

corpus = safepatch.Corpus.open("alcohol")  # a shipped category; or the path of a file of your own
for pair in corpus.pairs(2, seed=0):
    print(f"{pair.unsafe.text}  ->  {pair.safe.text}")

with tempfile.TemporaryDirectory() as folder:
    quick = ["training.steps=2", "training.batch_size=2", "data.pairs=4", "data.steps=2", "patch.gate=0"]
    config = safepatch.load_train_config(None, [f"output={folder}/run", f"data.cache={folder}/cache", *quick])
    path = safepatch.train(safepatch.load_pipeline("tiny-sd"), config, corpus)
    info = safepatch.verify(path)

print(info.instructions)
assert info.categories == ("alcohol",)
