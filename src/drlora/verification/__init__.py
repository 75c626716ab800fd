"""A check of anybody's LoRA on the experts of an MoE model, by its files; see `verify`.

keys        what each name in an adapter's file stands for, in any tool's spelling
contents    the adapter: settings, and each expert's factors, read when they are asked for
findings    what can be wrong, by name
checks      what the adapter alone, or with its base's configuration, shows
packing     by which layout B is packed
merges      a merged model against base and adapter
verify      all of it
"""
