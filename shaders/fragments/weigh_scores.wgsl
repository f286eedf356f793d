fn weigh(weights: ptr<function, array<f32, TOP_K>>) {}
