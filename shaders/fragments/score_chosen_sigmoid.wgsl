// The logits are compared and scored later: only NaN has no finite sigmoid.
fn score_row(base: u32, index: u32) {
    for (var e = index; e < ROUTER_OUTPUTS; e += WORKGROUP) {
        let logit = logit_at(base + e);
        scores[e] = logit;
        keys[e] = select(1u, 0u, is_nan(logit));
    }
}
