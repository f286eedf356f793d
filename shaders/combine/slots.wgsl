// combine: out[t] = ROUTED_SCALING_FACTOR * sum over slots, in order, of topk_weights * expert_out (+ shared).
// expert_out f32 [tokens * TOP_K, HIDDEN_SIZE]; out [tokens, HIDDEN_SIZE] in VALUES_PER_WORD values a word.
// id -1: no contribution. Any other id that no expert has (-2: the token is outside of the hash table) makes
// the row NaN: it is a fault, and never a silent zero.
// Twin: src/kernels/combine.rs
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) invocation: vec3<u32>, @builtin(num_workgroups) workgroups: vec3<u32>) {
    let values = token_count() * HIDDEN_SIZE;
    let words = (values + VALUES_PER_WORD - 1u) / VALUES_PER_WORD;
    for (var word = invocation.x; word < words; word += workgroups.x * 64u) {
        var packed = 0u;
        for (var i = 0u; i < VALUES_PER_WORD; i++) {
            let at = word * VALUES_PER_WORD + i;
            if at < values {
                let token = at / HIDDEN_SIZE;
                var sum = 0.0;
                var missed = false;
                for (var slot = token * TOP_K; slot < (token + 1u) * TOP_K; slot++) {
                    let id = topk_ids[slot];
                    missed = missed || id < -1 || id >= i32(NUM_EXPERTS);
                    if id >= 0 {
                        sum += topk_weights[slot] * expert_out[slot * HIDDEN_SIZE + at % HIDDEN_SIZE];
                    }
                }
                let total = ROUTED_SCALING_FACTOR * sum + shared_value(at);
                let bits = select(bitcast<u32>(total), 0x7fc00000u, missed);
                packed |= encode(bits) << (16u * i);
            }
        }
        out[word] = packed;
    }
}
