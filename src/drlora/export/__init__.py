"""Exports of an adapter for programs that do not know drlora; see `plan` for the three steps.

peft         plain PEFT LoRA on target_parameters: PEFT, vLLM where it can
per-expert   2-D keys of each expert: vLLM, SGLang, llama.cpp's converter
mlx          stacked tensors: mlx-lm
gguf         one file, by llama.cpp's converter: llama.cpp
sglang       stacked tensors: SGLang
merged       full weights in the model's own checkpoint format
"""
