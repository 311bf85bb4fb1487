"""Many photos: none is lost, none is captioned twice, and none stops the others.

`sources` lists photos, `pipeline` captions them, `journal` remembers what was done, `writers` and `sidecars` turn the
journal into files, `index` searches it, and `run` puts these together.
"""
