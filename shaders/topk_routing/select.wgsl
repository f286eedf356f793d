// topk_routing: logits f32 [tokens, ROUTER_OUTPUTS] -> topk_ids i32 [tokens, TOP_K] in descending order of the
// key, topk_weights f32 [tokens, TOP_K]. Only the first SELECTABLE outputs can be chosen. One workgroup a token;
// nothing is sorted: an expert's rank is the number of experts with a larger key, or an equal key and a lower id.
// keys[e]: order_key, 0 if the score is not finite: lowest, and its weight is 0 (NaN if NAN_PROPAGATES).
// score_row leaves 0 there for such a score, else 1 + its bits if it is subnormal: devices flush those to 0,
// but they are distinct keys.
// Twin: src/kernels/topk_routing.rs
var<workgroup> scores: array<f32, ROUTER_OUTPUTS>;
var<workgroup> keys: array<u32, ROUTER_OUTPUTS>;
var<workgroup> chosen: array<u32, TOP_K>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let token = workgroup.y;
    if token >= token_count() {
        return;
    }
    let base = token * ROUTER_OUTPUTS;
    if index < TOP_K {
        chosen[index] = 0u;
    }
    score_row(base, index);
    for (var e = index; e < SELECTABLE; e += WORKGROUP) {
        if keys[e] != 0u {
            keys[e] = selection_key(base, e, keys[e] - 1u);
        }
    }
    workgroupBarrier();
    select_experts(token, index);
    workgroupBarrier();
    if index != 0u {
        return;
    }
    if chosen[0] == NOT_IN_TABLE {
        for (var slot = 0u; slot < TOP_K; slot++) {
            topk_ids[token * TOP_K + slot] = -2;
            topk_weights[token * TOP_K + slot] = 0x7fc00000u;
        }
        return;
    }
    var weights: array<f32, TOP_K>;
    for (var slot = 0u; slot < TOP_K; slot++) {
        weights[slot] = scores[chosen[slot]];
    }
    var any_not_finite = weigh(&weights, base, token);
    var sum = 0.0;
    for (var slot = 0u; slot < TOP_K; slot++) {
        let finite = keys[chosen[slot]] != 0u;
        weights[slot] = select(0.0, weights[slot], finite);
        any_not_finite = any_not_finite || !finite;
        sum += weights[slot];
    }
    let divisor = renormalize_divisor(&weights, sum);
    for (var slot = 0u; slot < TOP_K; slot++) {
        let id = chosen[slot];
        // A divisor of 0 means that every weight is 0: they stay 0.
        var weight = select(weights[slot] / divisor, 0.0, divisor == 0.0) * expert_scale(id) * ROUTED_SCALING_FACTOR;
        if ROUND_WEIGHTS {
            weight = round_model(weight);
        }
        let skipped = ZERO_EXPERTS_SKIP && id >= NUM_EXPERTS;
        let nan = NAN_PROPAGATES && !skipped && (keys[id] == 0u || (RENORMALIZED && any_not_finite));
        topk_ids[token * TOP_K + slot] = i32(id);
        topk_weights[token * TOP_K + slot] = select(bitcast<u32>(select(weight, 0.0, skipped)), 0x7fc00000u, nan);
    }
}
