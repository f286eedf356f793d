// Slot i is the largest logit without the slots before; its weight is the softmax, at that logit, over those of
// them that are near: (max - l) / max(|l|, max) <= 2 ROUTER_JITTER_NOISE. -inf weighs nothing, NaN and +inf have
// no key.
fn weigh(weights: ptr<function, array<f32, TOP_K>>, base: u32, token: u32) -> bool {
    for (var slot = 0u; slot < TOP_K; slot++) {
        let largest = scores[chosen[slot]];
        var sum = 0.0;
        if keys[chosen[slot]] != 0u && is_finite(largest) {
            for (var e = 0u; e < SELECTABLE; e++) {
                var taken = false;
                for (var before = 0u; before < slot; before++) {
                    taken = taken || chosen[before] == e;
                }
                let logit = scores[e];
                if !taken && keys[e] != 0u && is_finite(logit) {
                    let width = max(abs(logit), largest);
                    // A width of 0 has both logits at 0, which is near.
                    let far = width > 0.0 && (largest - logit) / width > 2.0 * ROUTER_JITTER_NOISE;
                    sum += select(exp(max(logit - largest, -104.0)), 0.0, far);
                }
            }
        }
        (*weights)[slot] = select(1.0 / sum, 0.0, sum == 0.0);
    }
    return false;
}
