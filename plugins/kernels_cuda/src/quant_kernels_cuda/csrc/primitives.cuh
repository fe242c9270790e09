// Instructions that C++ has no name for, and bit patterns of the two activation types.
// F16 = 1: activations are float16, else bfloat16.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define MEMBER static __device__ __forceinline__  // of a struct

// A value that stays in its register: the compiler does not see what it is made of.
DEVICE u32 keep(u32 v) {
  asm volatile("" : "+r"(v));
  return v;
}
DEVICE const char* keep(const char* v) {
  asm volatile("" : "+l"(v));
  return v;
}
// x / d for x < 2^32 / d; ``inverse`` is 2^32 / d rounded up, 0 if d is 1.
DEVICE u32 divided(u32 x, u32 inverse) { return inverse ? __umulhi(x, inverse) : x; }
DEVICE u32 dup16(u32 v) { return v * 0x10001u; }
DEVICE u32 prmt(u32 a, u32 b, u32 sel) {
  u32 r;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(sel));
  return r;
}
DEVICE u32 and_or(u32 a, u32 mask, u32 set) {  // (a & mask) | set
  u32 r;
  asm("lop3.b32 %0,%1,%2,%3,0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(set));
  return r;
}
DEVICE u32 and_xor(u32 a, u32 mask, u32 flip) {  // (a & mask) ^ flip
  u32 r;
  asm("lop3.b32 %0,%1,%2,%3,0x6A;" : "=r"(r) : "r"(a), "r"(mask), "r"(flip));
  return r;
}
DEVICE u32 pick(u32 a, u32 b, u32 mask) {  // bits of a where the mask has ones, else of b
  u32 r;
  asm("lop3.b32 %0,%1,%2,%3,0xE4;" : "=r"(r) : "r"(a), "r"(b), "r"(mask));
  return r;
}

// Pairs of activations. Products and sums are exact wherever this package uses them.
#if F16
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
DEVICE u32 mul2(u32 a, u32 b) {
  u32 r;
  asm("mul.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DEVICE float act_to_float(u16 v) {
  float r;
  asm("cvt.f32.f16 %0,%1;" : "=f"(r) : "h"(v));
  return r;
}
DEVICE u16 float_to_act(float v) {
  u16 r;
  asm("cvt.rn.f16.f32 %0,%1;" : "=h"(r) : "f"(v));
  return r;
}
#else
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.bf16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
DEVICE u32 mul2(u32 a, u32 b) { return fma2(a, b, 0x80008000u); }  // mul.bf16x2 needs sm_90
DEVICE float act_to_float(u16 v) { return __int_as_float((u32)v << 16); }
DEVICE u16 float_to_act(float v) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(r) : "f"(v));
  return r;
}
#endif

DEVICE u32 low2(u32 v) {  // one half of a pair, twice
  u32 r;
  asm("{\n\t.reg .b16 l,h;\n\tmov.b32 {l,h},%1;\n\tmov.b32 %0,{l,l};\n\t}" : "=r"(r) : "r"(v));
  return r;
}
DEVICE u32 high2(u32 v) {
  u32 r;
  asm("{\n\t.reg .b16 l,h;\n\tmov.b32 {l,h},%1;\n\tmov.b32 %0,{h,h};\n\t}" : "=r"(r) : "r"(v));
  return r;
}

// c += A (16 x 16 weights) * B (16 x 8 activations)
DEVICE void mma(float* c, const u32* a, u32 b0, u32 b1) {
#if F16
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// B fragments of two steps: four 8 x 8 matrices, the address of one row per lane
DEVICE void ldmatrix4(u32* b, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address)
               : "memory");
}

// Asynchronous copies to shared memory; ``bytes`` less than the size fills the rest with zeros.
DEVICE void copy16(u32 to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0],[%1],16,%2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}
DEVICE void copy16_small(u32 to, const void* from, int bytes) {
  if (IN_WEIGHT && CODE_BITS == 4)  // many scales: those that other warps ask for come along
    copy16(to, from, bytes);
  else
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}
DEVICE void copy8(u32 to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],8,%2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Programmatic dependent launch; no effect without the launch attribute.
// The order is what makes it safe: dependents start only after all that this grid waits for is
// done, so what they read before their own wait (weights) was written before.
DEVICE void wait_then_release_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void cluster_arrive_relaxed() {  // for who asks only whether the others run
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
DEVICE float cluster_read(u32 address, u32 rank) {  // of another block's shared memory
  float v = 0.f;
#if __CUDA_ARCH__ >= 900
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0,%1,%2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0,[%1];" : "=f"(v) : "r"(there) : "memory");
#endif
  return v;
}

// Barriers in shared memory: who arrives goes on, who needs the others' work waits.
DEVICE void barrier_init(u32 at, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0],%1;" ::"r"(at), "r"(count) : "memory");
}
DEVICE void barrier_arrive(u32 at) {
  asm volatile("{\n\t.reg .b64 t;\n\tmbarrier.arrive.shared.b64 t,[%0];\n\t}" ::"r"(at) : "memory");
}
DEVICE void barrier_wait(u32 at, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.test_wait.parity.shared.b64 p,[%1],%2;\n\t"
        "selp.u32 %0,1,0,p;\n\t}"
        : "=r"(done)
        : "r"(at), "r"(parity)
        : "memory");
}

// Values sent to another block of the cluster: they count as bytes at a barrier of that block,
// which waits until all that it expects have come. No fence, and nobody else waits.
DEVICE void barrier_expect(u32 at, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n\t.reg .b64 t;\n\tmbarrier.arrive.expect_tx.shared.b64 t,[%0],%1;\n\t"
               "fence.mbarrier_init.release.cluster;\n\t}" ::"r"(at), "r"(bytes)
               : "memory");
#endif
}
DEVICE void cluster_send(u32 address, u32 barrier, u32 rank, float4 v) {
#if __CUDA_ARCH__ >= 900
  u32 there, count;
  asm volatile("mapa.shared::cluster.u32 %0,%1,%2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0,%1,%2;" : "=r"(count) : "r"(barrier), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0],{%1,%2,%3,%4},[%5];"
      ::"r"(there), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(count)
      : "memory");
#endif
}
DEVICE void barrier_wait_received(u32 at) {
#if __CUDA_ARCH__ >= 900
  u32 done = 0;
  while (!done)
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p,[%1],0;\n\t"
        "selp.u32 %0,1,0,p;\n\t}"
        : "=r"(done)
        : "r"(at)
        : "memory");
#endif
}
