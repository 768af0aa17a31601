"""Run by itself, far from the repository: opens an export where neither JAX nor `gau` can be imported.

    python without_jax.py DIRECTORY PROMPT MAX_TOKENS

prints JSON: ids of the prompt, its logits' sum and last row, the greedy continuation as text and as ids.
"""

import json
import sys

for blocked in ('jax', 'flax', 'gau'):
    sys.modules[blocked] = None

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

directory, prompt, max_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
model, info = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
model.eval()
# What is saved again has all the files, too.
model.save_pretrained('saved_again')
again = AutoModelForCausalLM.from_pretrained('saved_again', trust_remote_code=True).eval()
inputs = tokenizer(prompt, return_tensors='pt')
with torch.no_grad():
    logits = model(**inputs).logits[0]
    assert torch.equal(again(**inputs).logits[0], logits)
    written = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0, inputs['input_ids'].shape[1] :]
print(
    json.dumps(
        {
            'prompt': inputs['input_ids'][0].tolist(),
            'logits': logits.tolist(),
            'ids': written.tolist(),
            'text': tokenizer.decode(written, skip_special_tokens=True),
        }
    )
)
