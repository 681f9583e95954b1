// All kernels, for who compiles them ahead; at run time they are compiled one by one (pylo_integrations/ops/cubins.py).
#include "kernels.cuh"

#include "kernels.inc"
