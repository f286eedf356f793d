// The logits are compared and scored later: only NaN has no finite sigmoid.
fn score_row(base: u32, index: u32) {
    for (var e = index; e < ROUTER_OUTPUTS; e += WORKGROUP) {
        scores[e] = logits[base + e];
        keys[e] = select(1u, 0u, is_nan(logits[base + e]));
    }
}
