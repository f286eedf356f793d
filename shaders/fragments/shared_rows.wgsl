// shared_out f32 [tokens * SHARED_MLPS, HIDDEN_SIZE].
fn join_shared(sum: f32, token: u32, col: u32) -> f32 {
    var joined = sum;
    for (var mlp = token * SHARED_MLPS; mlp < (token + 1u) * SHARED_MLPS; mlp++) {
        let row = round_step(shared_out[mlp * HIDDEN_SIZE + col]);
        joined = round_step(joined + round_step(round_step(shared_factor(mlp)) * row));
    }
    return round_step(SHARED_AVERAGE * joined);
}
