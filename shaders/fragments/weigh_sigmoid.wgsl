fn weigh(weights: ptr<function, array<f32, TOP_K>>, base: u32, token: u32) -> bool {
    for (var slot = 0u; slot < TOP_K; slot++) {
        (*weights)[slot] = sigmoid((*weights)[slot]);
    }
    return false;
}
