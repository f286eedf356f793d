// combine: out[t] = ROUTED_SCALING_FACTOR * routed sum (+ output bias), joined with the shared experts.
// out [tokens, HIDDEN_SIZE] in VALUES_PER_WORD values a word. The routed sum is over slots of expert_out
// f32 [tokens * TOP_K, HIDDEN_SIZE], or the row that stands there already (f32 [tokens, HIDDEN_SIZE]).
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
                let col = at % HIDDEN_SIZE;
                let routed = round_step(ROUTED_SCALING_FACTOR * routed_sum(token, col));
                let total = join_shared(add_bias(routed, col), token, col);
                let bits = select(bitcast<u32>(total), 0x7fc00000u, is_missed(token));
                packed |= encode(bits) << (16u * i);
            }
        }
        out[word] = packed;
    }
}
