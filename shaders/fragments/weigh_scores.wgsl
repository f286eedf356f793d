// Scores are weights as they are. True would say that the row is spoiled beyond the chosen.
fn weigh(weights: ptr<function, array<f32, TOP_K>>, base: u32, token: u32) -> bool {
    return false;
}
