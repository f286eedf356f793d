// stream: reads a buffer once, as fast as memory gives it. sums[invocation] = exclusive or of the words that it read:
// a result, so that no read can be left out. Twin: src/kernels/stream.rs
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) invocation: vec3<u32>, @builtin(num_workgroups) workgroups: vec3<u32>) {
    let stride = workgroups.x * 256u;
    let vecs = arrayLength(&source);
    var a = vec4<u32>();
    var b = vec4<u32>();
    var c = vec4<u32>();
    var d = vec4<u32>();
    var at = invocation.x;
    // Four loads in flight.
    for (; at + 3u * stride < vecs; at += 4u * stride) {
        a ^= source[at];
        b ^= source[at + stride];
        c ^= source[at + 2u * stride];
        d ^= source[at + 3u * stride];
    }
    for (; at < vecs; at += stride) {
        a ^= source[at];
    }
    let all = a ^ b ^ c ^ d;
    sums[invocation.x] = all.x ^ all.y ^ all.z ^ all.w;
}
