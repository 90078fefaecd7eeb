/* The pointwise work of a step of the recurrence on a CPU, a pass over memory where torch's operators take a dozen.

   cpu_kernels.py calls it; units.py and steps.py have the same in torch's operators, with the equations. Everything is
   float, with its features first and rows of the batch last: [H, B] is H rows of B. One thread: a step is too small for
   more. Nothing here knows Python.

   Rounded alike on every machine (-ffp-contract=off), but for sums over B.

   Legend: B rows of the batch, H units, L layers. Rows of pre-activations come in the order of units.py: LSTM's
   candidate, i, f, o; GRU's candidate, r, z. gain and bias: of layer norm, as many rows as the pre-activations, null
   without it; normal of their shape and rstd (a B for each H rows) are then kept for backward, which adds to the
   gradients of gain and bias. The gradient of h is the sum of d_h and d_passed, [H, B] both. */

#include <math.h>
#include <stddef.h>

#define NORM_EPS 1e-5f /* as in units.py */
#define BLOCK 64 /* columns at a time: what is summed over H stays in registers and the first cache */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define KERNEL __attribute__((target_clones("default", "avx2", "avx512f"))) void
#else
#define KERNEL void
#endif
#define INLINE static inline __attribute__((always_inline))

typedef ptrdiff_t size;

/* Raised when what a function takes changes: cpu_kernels.py uses no library of another one. */
const int gfrnn_cpu_kernels = 1;

/* ------------------------------------------------------------------------------------------------------ functions */

typedef union {
  int bits;
  float value;
} word;

/* yes ? a : b without a branch: where a compiler finds one it computes one element at a time. */
INLINE float choose(int yes, float a, float b) {
  word one = {.value = a}, other = {.value = b}, chosen;
  chosen.bits = (one.bits & -yes) | (other.bits & (yes - 1));
  return chosen.value;
}

/* exp, tanh: Cephes' polynomials (Moshier), to two units in the last place; a NaN stays one. */
INLINE float exponential(float x) {
  x = choose(x > 88.0f, 88.0f, x);
  x = choose(x < -87.0f, -87.0f, x);
  int n = (int)(x * 1.44269504f + choose(x < 0.0f, -0.5f, 0.5f));
  float r = x - (float)n * 0.693359375f + (float)n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  word power = {.bits = (n + 127) << 23};
  return (p * r * r + r + 1.0f) * power.value;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

INLINE float hyperbolic_tangent(float x) {
  float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  float near = x + x * z * p;
  float far = 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
  return choose(z < 0.390625f, near, far);
}

/* -------------------------------------------------------------------------------------------------- normalisation */

/* x [H, B] at columns [b, b + n): normal = (x - mean) / deviation over H; rstd [B]. */
INLINE void normalize(size H, size B, size b, size n, const float *restrict x, float *restrict normal,
                      float *restrict rstd) {
  float mean[BLOCK], sum[BLOCK];
  for (size k = 0; k < n; k++) mean[k] = sum[k] = 0.0f;
  for (size h = 0; h < H; h++)
    for (size k = 0; k < n; k++) mean[k] += x[h * B + b + k];
  for (size k = 0; k < n; k++) mean[k] /= (float)H;
  for (size h = 0; h < H; h++)
    for (size k = 0; k < n; k++) {
      float off = x[h * B + b + k] - mean[k];
      sum[k] += off * off;
    }
  for (size k = 0; k < n; k++) rstd[b + k] = 1.0f / sqrtf(sum[k] / (float)H + NORM_EPS);
  for (size h = 0; h < H; h++)
    for (size k = 0; k < n; k++) normal[h * B + b + k] = (x[h * B + b + k] - mean[k]) * rstd[b + k];
}

/* Layer norm of x [H, B], in place. */
INLINE void layer_norm(size H, size B, size b, size n, float *restrict x, float *restrict normal, float *restrict rstd,
                       const float *restrict gain, const float *restrict bias) {
  normalize(H, B, b, n, x, normal, rstd);
  for (size h = 0; h < H; h++)
    for (size k = 0; k < n; k++) x[h * B + b + k] = bias[h] + normal[h * B + b + k] * gain[h];
}

/* d [H, B]: from the gradient of gain * normal + bias to that of what was normalised, in place; adds to the gradients
   of gain and bias [H]. */
INLINE void normalize_backward(size H, size B, size b, size n, float *restrict d, const float *restrict normal,
                               const float *restrict rstd, const float *restrict gain, float *restrict d_gain,
                               float *restrict d_bias) {
  float mean[BLOCK], slope[BLOCK];
  for (size k = 0; k < n; k++) mean[k] = slope[k] = 0.0f;
  for (size h = 0; h < H; h++) {
    float of_gain = 0.0f, of_bias = 0.0f;
#pragma omp simd reduction(+ : of_gain, of_bias)
    for (size k = 0; k < n; k++) {
      size at = h * B + b + k;
      of_bias += d[at];
      of_gain += d[at] * normal[at];
      d[at] *= gain[h];
      mean[k] += d[at];
      slope[k] += d[at] * normal[at];
    }
    d_bias[h] += of_bias;
    d_gain[h] += of_gain;
  }
  for (size k = 0; k < n; k++) mean[k] /= (float)H, slope[k] /= (float)H;
  for (size h = 0; h < H; h++)
    for (size k = 0; k < n; k++) {
      size at = h * B + b + k;
      d[at] = (d[at] - mean[k] - normal[at] * slope[k]) * rstd[b + k];
    }
}

/* ----------------------------------------------------------------------------------------------------------- LSTM */

/* Candidate [H, B] and gates [3, H, B], pre-activations, to activations in place; the next c and h [H, B].
   cell_...: of layer norm of the cell. capped: i is at most 1 - f. */
KERNEL lstm_forward(size H, size B, size capped, float *restrict candidate, float *restrict gates,
                    const float *restrict c, float *restrict c_next, float *restrict h_next, const float *restrict gain,
                    const float *restrict bias, float *restrict normal, float *restrict rstd,
                    const float *restrict cell_gain, const float *restrict cell_bias, float *restrict cell_normal,
                    float *restrict cell_rstd) {
  size HB = H * B;
  for (size b = 0; b < B; b += BLOCK) {
    size n = B - b < BLOCK ? B - b : BLOCK;
    if (gain)
      for (size g = 0; g < 4; g++)
        layer_norm(H, B, b, n, g ? gates + (g - 1) * HB : candidate, normal + g * HB, rstd + g * B, gain + g * H,
                   bias + g * H);
    for (size h = 0; h < H; h++) {
#pragma omp simd
      for (size k = 0; k < n; k++) {
        size at = h * B + b + k;
        float a = hyperbolic_tangent(candidate[at]), f = sigmoid(gates[HB + at]), i = sigmoid(gates[at]);
        i = choose((int)capped & (i > 1.0f - f), 1.0f - f, i);
        candidate[at] = a, gates[at] = i, gates[HB + at] = f;
        gates[2 * HB + at] = sigmoid(gates[2 * HB + at]);
        c_next[at] = f * c[at] + i * a;
      }
      if (!cell_gain)
#pragma omp simd
        for (size k = 0; k < n; k++) {
          size at = h * B + b + k;
          h_next[at] = gates[2 * HB + at] * hyperbolic_tangent(c_next[at]);
        }
    }
    if (cell_gain) {
      normalize(H, B, b, n, c_next, cell_normal, cell_rstd);
      for (size h = 0; h < H; h++)
#pragma omp simd
        for (size k = 0; k < n; k++) {
          size at = h * B + b + k;
          h_next[at] = gates[2 * HB + at] * hyperbolic_tangent(cell_bias[h] + cell_normal[at] * cell_gain[h]);
        }
    }
  }
}

/* To d [4, H, B], the gradient of the pre-activations; d_c from that of c_next to that of c, in place. */
KERNEL lstm_backward(size H, size B, size capped, const float *restrict candidate, const float *restrict gates,
                     const float *restrict c, const float *restrict c_next, const float *restrict d_h,
                     const float *restrict d_passed, float *restrict d_c, float *restrict d, const float *restrict gain,
                     const float *restrict normal, const float *restrict rstd, const float *restrict cell_gain,
                     const float *restrict cell_bias, const float *restrict cell_normal,
                     const float *restrict cell_rstd, float *restrict d_gain, float *restrict d_bias,
                     float *restrict d_cell_gain, float *restrict d_cell_bias) {
  size HB = H * B;
  float *d_o = d + 3 * HB, *d_cell = d; /* the candidate's place, until its own gradient comes */
  for (size b = 0; b < B; b += BLOCK) {
    size n = B - b < BLOCK ? B - b : BLOCK;
    for (size h = 0; h < H; h++) {
      float scale = cell_gain ? cell_gain[h] : 1.0f, shift = cell_gain ? cell_bias[h] : 0.0f;
      const float *cell = cell_gain ? cell_normal : c_next;
#pragma omp simd
      for (size k = 0; k < n; k++) {
        size at = h * B + b + k;
        float o = gates[2 * HB + at], up = d_h[at] + d_passed[at];
        float squashed = hyperbolic_tangent(shift + cell[at] * scale);
        d_o[at] = up * squashed * o * (1.0f - o);
        d_cell[at] = up * o * (1.0f - squashed * squashed);
      }
    }
    if (cell_gain) normalize_backward(H, B, b, n, d_cell, cell_normal, cell_rstd, cell_gain, d_cell_gain, d_cell_bias);
    for (size h = 0; h < H; h++)
#pragma omp simd
      for (size k = 0; k < n; k++) {
        size at = h * B + b + k;
        float a = candidate[at], i = gates[at], f = gates[HB + at];
        float of_c = d_c[at] + d_cell[at], of_i = of_c * a, of_f = of_c * c[at];
        int at_cap = (int)capped & (i >= 1.0f - f); /* never above: forward left that very number */
        of_f = choose(at_cap, of_f - of_i, of_f);
        of_i = choose(at_cap, 0.0f, of_i);
        d[at] = of_c * i * (1.0f - a * a);
        d[HB + at] = of_i * i * (1.0f - i);
        d[2 * HB + at] = of_f * f * (1.0f - f);
        d_c[at] = of_c * f;
      }
    if (gain)
      for (size g = 0; g < 4; g++)
        normalize_backward(H, B, b, n, d + g * HB, normal + g * HB, rstd + g * B, gain + g * H, d_gain + g * H,
                           d_bias + g * H);
  }
}

/* ------------------------------------------------------------------------------------------------------ GRU, tanh */

/* Candidate [H, B] and gates [2, H, B], pre-activations, to activations in place: the candidate's with r * s in it, s
   [H, B] its recurrent sum. The next h from h [H, B]. */
KERNEL gru_forward(size H, size B, float *restrict candidate, float *restrict gates, const float *restrict s,
                   const float *restrict before, float *restrict h_next, const float *restrict gain,
                   const float *restrict bias, float *restrict normal, float *restrict rstd) {
  size HB = H * B;
  for (size b = 0; b < B; b += BLOCK) {
    size n = B - b < BLOCK ? B - b : BLOCK;
    if (gain)
      for (size g = 1; g < 3; g++)
        layer_norm(H, B, b, n, gates + (g - 1) * HB, normal + g * HB, rstd + g * B, gain + g * H, bias + g * H);
    for (size h = 0; h < H; h++)
#pragma omp simd
      for (size k = 0; k < n; k++) {
        size at = h * B + b + k;
        gates[at] = sigmoid(gates[at]);
        gates[HB + at] = sigmoid(gates[HB + at]);
        candidate[at] += gates[at] * s[at];
      }
    if (gain) layer_norm(H, B, b, n, candidate, normal, rstd, gain, bias);
    for (size h = 0; h < H; h++)
#pragma omp simd
      for (size k = 0; k < n; k++) {
        size at = h * B + b + k;
        float a = hyperbolic_tangent(candidate[at]);
        candidate[at] = a;
        h_next[at] = a + gates[HB + at] * (before[at] - a);
      }
  }
}

/* To d [3, H, B], the gradient of the pre-activations, and d_s [H, B]; adds to d_before, that of h, what goes past the
   products. */
KERNEL gru_backward(size H, size B, const float *restrict candidate, const float *restrict gates,
                    const float *restrict s, const float *restrict before, const float *restrict d_h,
                    const float *restrict d_passed, float *restrict d_before, float *restrict d, float *restrict d_s,
                    const float *restrict gain, const float *restrict normal, const float *restrict rstd,
                    float *restrict d_gain, float *restrict d_bias) {
  size HB = H * B;
  for (size b = 0; b < B; b += BLOCK) {
    size n = B - b < BLOCK ? B - b : BLOCK;
    for (size h = 0; h < H; h++)
#pragma omp simd
      for (size k = 0; k < n; k++) {
        size at = h * B + b + k;
        float a = candidate[at], z = gates[HB + at], up = d_h[at] + d_passed[at];
        d[at] = up * (1.0f - z) * (1.0f - a * a);
        d[2 * HB + at] = up * (before[at] - a) * z * (1.0f - z);
        d_before[at] += up * z;
      }
    if (gain) normalize_backward(H, B, b, n, d, normal, rstd, gain, d_gain, d_bias);
    for (size h = 0; h < H; h++)
#pragma omp simd
      for (size k = 0; k < n; k++) {
        size at = h * B + b + k;
        float r = gates[at];
        d[HB + at] = d[at] * s[at] * r * (1.0f - r);
        d_s[at] = d[at] * r;
      }
    if (gain)
      for (size g = 1; g < 3; g++)
        normalize_backward(H, B, b, n, d + g * HB, normal + g * HB, rstd + g * B, gain + g * H, d_gain + g * H,
                           d_bias + g * H);
  }
}

/* The next h from the pre-activation [H, B], which layer norm writes to. */
KERNEL tanh_forward(size H, size B, float *restrict candidate, float *restrict h_next, const float *restrict gain,
                    const float *restrict bias, float *restrict normal, float *restrict rstd) {
  for (size b = 0; b < B; b += BLOCK) {
    size n = B - b < BLOCK ? B - b : BLOCK;
    if (gain) layer_norm(H, B, b, n, candidate, normal, rstd, gain, bias);
    for (size h = 0; h < H; h++)
#pragma omp simd
      for (size k = 0; k < n; k++) h_next[h * B + b + k] = hyperbolic_tangent(candidate[h * B + b + k]);
  }
}

/* To d [H, B], the gradient of the pre-activation. */
KERNEL tanh_backward(size H, size B, const float *restrict h_next, const float *restrict d_h,
                     const float *restrict d_passed, float *restrict d, const float *restrict gain,
                     const float *restrict normal, const float *restrict rstd, float *restrict d_gain,
                     float *restrict d_bias) {
  for (size b = 0; b < B; b += BLOCK) {
    size n = B - b < BLOCK ? B - b : BLOCK;
    for (size h = 0; h < H; h++)
#pragma omp simd
      for (size k = 0; k < n; k++) {
        size at = h * B + b + k;
        d[at] = (d_h[at] + d_passed[at]) * (1.0f - h_next[at] * h_next[at]);
      }
    if (gain) normalize_backward(H, B, b, n, d, normal, rstd, gain, d_gain, d_bias);
  }
}

/* --------------------------------------------------------------------------------------------------- global gates */

/* g [L, B], in which are products, += a [L, B], squashed; gated [L, H, B] = g * h. */
KERNEL gates_forward(size L, size H, size B, const float *restrict a, float *restrict g, const float *restrict h,
                     float *restrict gated) {
  for (size i = 0; i < L; i++) {
    float *gate = g + i * B;
#pragma omp simd
    for (size b = 0; b < B; b++) gate[b] = sigmoid(gate[b] + a[i * B + b]);
    for (size r = i * H; r < (i + 1) * H; r++)
      for (size b = 0; b < B; b++) gated[r * B + b] = h[r * B + b] * gate[b];
  }
}

/* From d_gated [L, H, B]: adds to d_h [L, H, B]; d_a [L, B]. */
KERNEL gates_backward(size L, size H, size B, const float *restrict d_gated, const float *restrict g,
                      const float *restrict h, float *restrict d_h, float *restrict d_a) {
  for (size i = 0; i < L; i++) {
    const float *gate = g + i * B;
    for (size b = 0; b < B; b += BLOCK) {
      size n = B - b < BLOCK ? B - b : BLOCK;
      float sum[BLOCK];
      for (size k = 0; k < n; k++) sum[k] = 0.0f;
      for (size r = i * H; r < (i + 1) * H; r++)
        for (size k = 0; k < n; k++) {
          size at = r * B + b + k;
          d_h[at] += d_gated[at] * gate[b + k];
          sum[k] += d_gated[at] * h[at];
        }
      for (size k = 0; k < n; k++) d_a[i * B + b + k] = sum[k] * gate[b + k] * (1.0f - gate[b + k]);
    }
  }
}
