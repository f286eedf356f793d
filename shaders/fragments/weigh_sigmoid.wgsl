fn weigh(weights: ptr<function, array<f32, TOP_K>>) {
    for (var slot = 0u; slot < TOP_K; slot++) {
        (*weights)[slot] = sigmoid((*weights)[slot]);
    }
}
