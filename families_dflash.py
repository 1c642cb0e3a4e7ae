# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""List the families of targets that the tests or the benchmark decode.

This file travels with every pushed draft. It imports nothing, so that the catalogue is read without torch.
"""

_NAMES = """
afmoe apertus apertus1p5_text arcee aria_text axk1 bailing_hybrid bamba beam bert bert-generation
biogpt bitnet camembert codegen cohere cohere2 cohere2_moe ctrl cwm data2vec-text deepseek_v2
deepseek_v3 diffllama dots1 ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1
flex_olmo flint gemma gemma2 gemma3_text gemma4_text gemma4_unified_text glm glm4 glm4_moe
glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granite_swa granitemoe
granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3
hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lara_mini lfm2 lfm3 llama mellum
mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral muse_glimmer_text nanochat
nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe
qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next roberta roberta-prelayernorm roc_bert
sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 step3p5 vaultgemma xlm-roberta
xlm-roberta-xl youtu
"""

TESTED = frozenset(_NAMES.split())
"""Text model types that decode token for token like their own `generate`, by the tests or by benchmarks/families.py."""
