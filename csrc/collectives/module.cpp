// megallm._collectives: collectives between the ranks of one host. Tensors come as addresses: nothing here depends on
// a version of torch. The process group on top of it: megallm/base/shared_memory.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "group.hpp"

namespace py = pybind11;
using namespace collectives;

namespace {

void raise_as(const char* name, const std::exception& error) {
  PyErr_SetString(py::module_::import("torch.distributed").attr(name).ptr(), error.what());
}

void translate(std::exception_ptr given) {
  try {
    if (given) std::rethrow_exception(given);
  } catch (const PeerGone& error) {
    raise_as("DistNetworkError", error);
  } catch (const TimedOut& error) {
    raise_as("DistNetworkError", error);
  } catch (const Aborted& error) {
    raise_as("DistBackendError", error);
  }
}

}  // namespace

PYBIND11_MODULE(_collectives, m) {
  m.attr("VERSION") = 1;
  m.attr("MAX_RANKS") = kMaxRanks;
  py::register_exception_translator(translate);
  using Free = py::call_guard<py::gil_scoped_release>;
  py::class_<Handle>(m, "Handle")
      .def("done", [](Handle& self) { return self.lane->finished(*self.job); })
      .def("wait", [](Handle& self, double seconds) { self.lane->wait(self.job, self.group->patience(seconds)); },
           py::arg("seconds") = 0.0, Free());
  py::class_<Group, std::shared_ptr<Group>>(m, "Group")
      .def(py::init([](const std::string& path, std::uint64_t nonce, int rank, int ranks, double seconds, bool spins) {
             return std::shared_ptr<Group>(new Group(path, nonce, rank, ranks, seconds, spins), [](Group* group) {
               if (PyGILState_Check()) {  // its threads may need to end
                 py::gil_scoped_release free;
                 delete group;
               } else {
                 delete group;
               }
             });
           }),
           py::arg("path"), py::arg("nonce"), py::arg("rank"), py::arg("ranks"), py::arg("seconds"), py::arg("spins"))
      .def_property_readonly("fd", &Group::fd)
      .def("all_reduce", &Group::all_reduce, Free())
      .def("reduce_scatter", &Group::reduce_scatter, Free())
      .def("all_gather", &Group::all_gather, Free())
      .def("all_to_all", &Group::all_to_all, Free())
      .def("broadcast", &Group::broadcast, Free())
      .def("gather", &Group::gather, Free())
      .def("send", &Group::send, Free())
      .def("receive", &Group::receive, Free())
      .def("close", &Group::close, Free());
}
