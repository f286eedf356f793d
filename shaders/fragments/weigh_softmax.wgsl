// Softmax over the chosen logits that are finite.
fn weigh(weights: ptr<function, array<f32, TOP_K>>) {
    var largest = -3.4028234e38;
    for (var slot = 0u; slot < TOP_K; slot++) {
        if keys[chosen[slot]] != 0u {
            largest = max(largest, (*weights)[slot]);
        }
    }
    var sum = 0.0;
    for (var slot = 0u; slot < TOP_K; slot++) {
        if keys[chosen[slot]] != 0u {
            let distance = (*weights)[slot] - largest;
            (*weights)[slot] = select(exp(max(distance, -104.0)), 0.0, distance < -104.0);
            sum += (*weights)[slot];
        }
    }
    for (var slot = 0u; slot < TOP_K; slot++) {
        if keys[chosen[slot]] != 0u {
            (*weights)[slot] /= sum;
        }
    }
}
