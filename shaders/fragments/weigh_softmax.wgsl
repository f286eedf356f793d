// Softmax over the chosen logits; -inf weighs 0, and if there is nothing else, all do.
fn weigh(weights: ptr<function, array<f32, TOP_K>>, base: u32, token: u32) -> bool {
    var largest = -3.4028234e38;
    for (var slot = 0u; slot < TOP_K; slot++) {
        if keys[chosen[slot]] != 0u && is_finite((*weights)[slot]) {
            largest = max(largest, (*weights)[slot]);
        }
    }
    var sum = 0.0;
    for (var slot = 0u; slot < TOP_K; slot++) {
        var weight = 0.0;
        if keys[chosen[slot]] != 0u && is_finite((*weights)[slot]) {
            let distance = (*weights)[slot] - largest;
            weight = select(exp(max(distance, -104.0)), 0.0, distance < -104.0);
        }
        (*weights)[slot] = weight;
        sum += weight;
    }
    for (var slot = 0u; slot < TOP_K; slot++) {
        (*weights)[slot] = select((*weights)[slot] / sum, 0.0, sum == 0.0);
    }
    return false;
}
