// The gradient of x from that of u = silu(conv(x)), with conv.cu's macros but MODE: the gradient g of conv(x) is computed
// again where its neighbours need it, so that it is neither written nor read.
//
// A thread owns two channels and ROWS rows of one map, and walks along the columns. In step j it has columns j - 1, j and
// j + 1 of x, makes column j of g from them, and with columns j - 2 and j - 1 of g column j - 1 of the gradient.

constexpr int G_ROWS = ROWS + 2, X_ROWS = ROWS + 4;  // of g and of x: the first is -1 and -2 of ours

struct Column {
    float at[G_ROWS][2];
};

extern "C" __global__ void __launch_bounds__(128) depthwise_back(
    const io_t* __restrict__ x, const io_t* __restrict__ du, const float* __restrict__ weight,
    const float* __restrict__ bias, io_t* __restrict__ out, int batch) {
    const Place place;
    if (place.is_outside(batch)) return;
    const int pair = place.pair, first = place.first_row();
    const i64 map = place.map();

    float filter[9][2], shift[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) filter[tap][c] = weight[(2 * pair + c) * 9 + tap];
        shift[c] = HAS_BIAS ? bias[2 * pair + c] : 0.0f;
    }
    auto inside = [](int row) { return row >= 0 && row < HEIGHT; };

    // Packed, since three columns of floats would not leave room for g.
    Pack<2> left[X_ROWS], middle[X_ROWS], right[X_ROWS], coming[X_ROWS], grad[G_ROWS], grad_coming[G_ROWS];
    auto read = [&](Pack<2>* into, int column) {
#pragma unroll
        for (int r = 0; r < X_ROWS; ++r) {
            if (inside(first + r - 2) && column < WIDTH)
                into[r].load_vector(x + map + ((first + r - 2) * WIDTH + column) * E);
            else
                into[r].clear();
        }
    };
    auto read_gradients = [&](Pack<2>* into, int column) {
#pragma unroll
        for (int r = 0; r < G_ROWS; ++r) {
            if (inside(first + r - 1) && column < WIDTH)
                into[r].load_vector(du + map + ((first + r - 1) * WIDTH + column) * E);
            else
                into[r].clear();
        }
    };
#pragma unroll
    for (int r = 0; r < X_ROWS; ++r) left[r].clear();
    read(middle, 0);
    read(right, 1);
    read_gradients(grad, 0);
    Column two_back = {}, one_back = {};
#pragma unroll 3
    for (int j = 0; j <= WIDTH; ++j) {
        read(coming, j + 2);
        read_gradients(grad_coming, j + 1);
        Column g;
#pragma unroll
        for (int r = 0; r < G_ROWS; ++r)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float sum = shift[c];
#pragma unroll
                for (int a = 0; a < 3; ++a) {
                    sum += filter[3 * a][c] * left[r + a].get(c);
                    sum += filter[3 * a + 1][c] * middle[r + a].get(c);
                    sum += filter[3 * a + 2][c] * right[r + a].get(c);
                }
                const float gate = sigmoid(sum);
                g.at[r][c] = grad[r].get(c) * gate * (1.0f + sum * (1.0f - gate));  // outside of the map grad is zero
            }
        if (j > 0)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (!inside(first + r)) continue;
                float value[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float sum = 0.0f;
#pragma unroll
                    for (int a = 0; a < 3; ++a) {  // the filter turned round
                        sum += filter[8 - 3 * a][c] * two_back.at[r + a][c];
                        sum += filter[7 - 3 * a][c] * one_back.at[r + a][c];
                        sum += filter[6 - 3 * a][c] * g.at[r + a][c];
                    }
                    value[c] = sum;
                }
                Pack<2> result;
                result.set_pair(0, value[0], value[1]);
                result.store_vector(out + map + ((first + r) * WIDTH + j - 1) * E);
            }
        two_back = one_back, one_back = g;
#pragma unroll
        for (int r = 0; r < X_ROWS; ++r) left[r] = middle[r], middle[r] = right[r], right[r] = coming[r];
#pragma unroll
        for (int r = 0; r < G_ROWS; ++r) grad[r] = grad_coming[r];
    }
}
