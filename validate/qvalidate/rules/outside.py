"""Findings that no rule makes: the loader's before any rule can run, what comes after them."""

from collections.abc import Mapping

# id -> what it says
LOADING: Mapping[str, str] = {
    "checkpoint-missing": "there is no such directory",
    "checkpoint-empty": "the directory holds no safetensors file",
    "checkpoint-pickle": "the weights are pickled, and loading them would run code",
    "config-missing": "there is no config.json",
    "config-type": "a config is not a JSON object",
    "file-name": "the name of a file is not UTF-8",
    "file-unreadable": "a file can't be read",
    "index-ambiguous": "there are several indexes",
    "index-missing": "there are several safetensors files and no index to say which are the model",
    "index-missing-shard": "the index names a file that is not there",
    "index-missing-tensor": "the index names a tensor that is in no shard",
    "index-shard-name": "the index names something that is not a file beside it",
    "index-weight-map": "the index has no weight_map",
    "index-wrong-shard": "a tensor is in another shard than the index says",
    "tensor-duplicate": "a tensor is in two shards",
    "weights-ambiguous": "model.safetensors and an index are two sets of weights",
    "json-constant": "a JSON file has NaN or Infinity, which are not JSON",
    "json-duplicate-key": "a JSON object has a key twice",
    "json-number": "a JSON number is out of range",
    "json-surrogate": "a JSON key or value holds half a character",
    "json-syntax": "a file is not JSON",
    "json-utf8": "a JSON file is not UTF-8",
    "safetensors-dtype": "a tensor has a dtype that safetensors does not know",
    "safetensors-header-size": "a header is larger than the 100 MB that are allowed",
    "safetensors-header-start": "a header does not begin with '{'",
    "safetensors-hole": "bytes between two tensors belong to none",
    "safetensors-lfs-pointer": "a file is a Git LFS pointer; the weights were not downloaded",
    "safetensors-offsets": "a tensor's offsets do not fit its dtype and shape",
    "safetensors-overlap": "two tensors overlap",
    "safetensors-shape": "a shape is not a list of sizes",
    "safetensors-trailing-bytes": "bytes follow the last tensor",
    "safetensors-truncated": "a file is shorter than its header says",
}

WEIGHTS: Mapping[str, str] = {
    "weight-error": "a dequantized weight is further from the source's than its format can explain",
    "weight-nonfinite": "NaN or Inf in the source's weight, left out of the comparison (warning)",
    "weight-not-in-reference": "the source has no tensor of that name to compare with",
    "weight-reference-shape": "the source's tensor has another shape or is no weight",
    "kept-tensor-differs": "a tensor that is not quantized is not the source's, byte for byte",
    "smoothing-folded": "a norm has taken in the smoothing of the weights after it, which are "
    "compared by what it tells (note)",
    "weight-not-compared": "a weight was smoothed by what the two checkpoints do not tell (note)",
    "tensor-dropped": "tensors of the source that qconvert_report.json lists as dropped (note)",
    "config-differs": "a key of config.json has another value than in the source's, where no "
    "conversion changes one (warning)",
    "side-file-differs": "a tokenizer, chat template or generation config is not the source's "
    "(warning)",
    "side-file-missing": "a side file of the source that engines read is missing (warning)",
    "tensor-missing": "a tensor of the source is missing (lm_head.weight may be, where it is tied)",
}

ENGINE: Mapping[str, str] = {
    "engine-refused": "the engine did not load the checkpoint",
    "engine-crashed": "the engine died, or stopped with an error that is not about loading",
    "engine-timeout": "the engine did not answer within --timeout",
    "engine-missing": "that interpreter brought up no such engine; nothing was tested (exit 2)",
    "engine-version": "the engine that ran is none of the versions that --engine names; of those "
    "nothing was shown, which is no pass",
    "engine-no-kernel": "this machine has no kernel for the format; nothing was shown, which is no "
    "pass; --level rules asks for the rules alone",
    "engine-tokenizer": "the engine found no tokenizer and was given token ids",
    "compare-kl": "the mean KL divergence from the source is above --max-kl",
    "compare-top1": "the top-1 agreement with the source is below --min-top1",
    "compare-relative-error": "the relative error of the logprobs is above --max-rel",
    "generate-nonfinite": "what the engine generated has NaN or infinite logprobs",
    "compare-nonfinite": "the engine returned NaN or infinite logprobs for the checkpoint",
    "compare-reference": "the source's own run failed or gave nothing to compare with; the "
    "comparison says nothing about the checkpoint",
    "compare-size": "the two runs returned logprobs of different sizes",
    "compare-vocabulary": "the two checkpoints have vocabularies of different sizes",
}

SERVE: Mapping[str, str] = {
    "serve-not-ready": "the engine's server did not get ready",
    "serve-models": "the server does not list the model that it was started with",
    "serve-completions": "a completion is empty, has wrong counts, or NaN or infinite logprobs",
    "serve-chat": "a chat completion is empty, or the chat template fails",
}
