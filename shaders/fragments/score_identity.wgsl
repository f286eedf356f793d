fn score_row(base: u32, index: u32) {
    for (var e = index; e < ROUTER_OUTPUTS; e += WORKGROUP) {
        scores[e] = logits[base + e];
        keys[e] = select(0u, 1u, is_finite(logits[base + e]));
    }
}
