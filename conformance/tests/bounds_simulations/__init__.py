"""Honest and faulty arithmetic to try the bounds on.

Honest implementations compute in float32 as kernels do: with a running softmax, with base-2
exponentials, with tensor cores that cut bits off. Faulty ones are exact (float64, then stored) but
for one fault, so that what shows is the fault.
"""
