// Whisper's log-mel spectrogram, with the mel filters of the exported model.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <string>
#include <vector>

#include "safetensors.h"

namespace transcribe {

// A tensor over a file's memory, which has to outlive it.
inline at::Tensor tensor_of(const Safetensors::Tensor& tensor) {
  return at::from_blob(const_cast<float*>(tensor.data), tensor.shape, at::kFloat);
}

class Features {
 public:
  Features(const std::string& path, int64_t n_fft, int64_t hop_length, int64_t window_samples)
      : file_(path), n_fft_(n_fft), hop_length_(hop_length), window_samples_(window_samples) {
    const auto found = file_.tensors().find("mel_filters");
    if (found == file_.tensors().end() || found->second.shape.size() != 2 || found->second.shape[1] != n_fft / 2 + 1)
      throw InputError(path + ": expected mel_filters [bands, " + std::to_string(n_fft / 2 + 1) +
                       "], got none of that shape; export the model again");
    filters_ = tensor_of(found->second);
  }

  // [1, bands, frames] of at most `window_samples` samples, padded with zeros.
  at::Tensor operator()(const float* samples, int64_t count) const {
    at::Tensor padded = at::zeros({1, window_samples_});
    std::copy_n(samples, std::min(count, window_samples_), padded.mutable_data_ptr<float>());
    const at::Tensor spectrum =
        at::stft(padded, n_fft_, hop_length_, n_fft_, at::hann_window(n_fft_), /*center=*/true, "reflect",
                 /*normalized=*/false, /*onesided=*/true, /*return_complex=*/true);
    const at::Tensor power = spectrum.narrow(2, 0, spectrum.size(2) - 1).abs().square().contiguous();
    const at::Tensor mel = at::matmul(filters_, power).clamp_min(1e-10).log10();
    return (at::maximum(mel, mel.max() - 8.0) + 4.0) / 4.0;
  }

 private:
  Safetensors file_;
  int64_t n_fft_, hop_length_, window_samples_;
  at::Tensor filters_;  // [bands, n_fft / 2 + 1], in file_
};

}  // namespace transcribe
