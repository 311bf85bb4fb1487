"""The networks in torch: CNNs that give 4096 numbers, and recurrent decoders."""
