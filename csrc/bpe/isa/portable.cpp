// What any processor runs: the scalar scanner, the oracle of the others.
#include "bpe/isa/isa.h"

#define FASTFORMER_ISA portable
#define FASTFORMER_ISA_SCALAR
#include "bpe/isa/engine.h"
