/* The two passes over logits of training/head.py. */
#include "vector.h"

#define C float
#define LOAD_C load_f32
#define STORE_C store_f32
#define GET_C get_f32
#define PUT_C put_f32
#define NAME(x) x##_f32
#include "head.h"
#undef NAME
#undef C
#undef LOAD_C
#undef STORE_C
#undef GET_C
#undef PUT_C

#define C bf16
#define LOAD_C load_bf16
#define STORE_C store_bf16
#define GET_C get_bf16
#define PUT_C put_bf16
#define NAME(x) x##_bf16
#include "head.h"
